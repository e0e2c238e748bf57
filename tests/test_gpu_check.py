"""benchmarks/gpu_check on a machine without a GPU: its exit code, its checks on the test device, all its sections on
the CPU, deadlines and crashes of sections, the report."""

import json
import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from benchmarks import attention_checks, checks, gpu_check, gpu_report, gpu_sections, training_speed
from gptdist import ops
from gptdist.ops import backends
from tests.conftest import ROOT

SMALL = gpu_sections.TINY_SHAPES
CPU = torch.device("cpu")


# the checks


def test_checks_pass_on_the_test_device(device):
    with device.run(races=False) as log:
        found = list(checks.correctness(CPU, SMALL))
    assert log.launches
    assert [check for check in found if not check.ok] == []
    assert {"layer_norm", "residual_layer_norm", "bias_gelu", "cross_entropy", "dropout"} <= {c.name for c in found}


def test_attention_checks_pass_on_the_test_device(device):
    with device.run(races=False) as log:
        found = list(attention_checks.correctness(CPU, lengths=(70,), long=140))
    assert log.launches
    assert [check for check in found if not check.ok] == []
    wanted = {"attention out", "attention dq", "attention dk", "attention dv", "attention repeated"}
    assert wanted | {"opcheck attention_fwd", "opcheck attention_bwd"} == {check.name for check in found}


def test_attention_cases_are_the_promised_ones():
    cases = set(attention_checks.all_cases())
    assert {case.T for case in cases} == {1, 7, 64, 128, 131, 200, 256, 512, 2048, 16384}
    assert {(case.D, case.documents, case.p > 0) for case in cases if case.G > 1} >= {
        (D, documents, dropped) for D in (64, 128) for documents in (False, True) for dropped in (False, True)
    }


@pytest.mark.parametrize("wrong", ["dq", "dv"])
def test_a_wrong_gradient_of_attention_fails(monkeypatch, wrong):
    right = ops.attention

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv):
            return qkv.clone()

        @staticmethod
        def backward(ctx, gradient):
            position, slot = (-1, 0) if wrong == "dq" else (0, -1)
            gradient = gradient.clone()
            gradient[:, position, :, slot] *= 1.5
            return gradient

    def attention(qkv, **options):
        return right(qkv if qkv.dtype == torch.float64 else Wrong.apply(qkv), **options)

    monkeypatch.setattr(ops, "attention", attention)
    torch.manual_seed(0)
    found = list(attention_checks.check(attention_checks.AttentionCase(1, 16, 1, 1, 64), CPU, torch.bfloat16))
    assert [check.name for check in found if not check.ok] == [f"attention {wrong}"]


def test_checks_notice_the_reference():
    """Without kernels the comparisons say nothing, and the run fails."""
    failed = [check.name for check in checks.check_backends(CPU) if not check.ok]
    assert "backend of layer_norm" in failed
    assert "backend of attention" in failed


def test_wrong_numbers_fail():
    good, bad = [torch.ones(3)], [torch.tensor([1.0, 1.0, 1.001])]
    assert checks.largest_error(bad, [good[0].double()]) == pytest.approx(1e-3, rel=1e-2)
    assert not checks.Check("op", "float32", "", float("nan"), 1.0).ok
    assert checks.largest_error([torch.tensor([float("nan")])], [torch.ones(1).double()]) != 0


# training


def test_all_ops_train_alike():
    """The same model on the kernels (here the reference), the reference and PyTorch's functions: the same losses."""
    found = list(training_speed.speeds(CPU, tiny=True))
    assert [speed.variant for speed in found] == [f"{name}, eager" for name in ("kernels", "reference", "PyTorch")]
    assert all(speed.note == "" and speed.tokens_per_s > 0 for speed in found)
    assert max(speed.loss for speed in found) - min(speed.loss for speed in found) < 0.01
    assert found[0].loss < math.log(training_speed.TINY.vocab_size) - 0.5  # 13 steps on the same tokens


def test_a_variant_that_fails_leaves_the_others(monkeypatch):
    def no_memory(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training_speed, "torch_attention", no_memory)
    found = list(training_speed.speeds(CPU, tiny=True))
    assert [speed.note for speed in found] == ["", "", "CUDA out of memory"]


# sections


def in_this_process(names, tmp_path):
    outcomes = []
    for name in names:
        results = tmp_path / f"{name}.jsonl"
        gpu_check.run_section(name, CPU, results)
        lines = [tuple(json.loads(line)) for line in results.read_text().splitlines()]
        outcomes.append(gpu_check.Outcome(name, gpu_sections.SECTIONS[name].title, lines, 1.0))
    return outcomes


def test_sections_and_report(tmp_path):
    """Times, training and the sanitizer's target at tiny sizes; the checks have tests of their own."""
    outcomes = in_this_process(["attention-times", "training", "times"], tmp_path)
    gpu_check.run_section("smoke", CPU, tmp_path / "smoke.jsonl")
    assert "smoke" in (tmp_path / "smoke.jsonl").read_text()
    bad = checks.Check("op", "float32", "[1]", 0.5, 0.1, "why")
    good = checks.Check("op", "float32", "[2]", 0, 0.1)
    results = [("check", gpu_sections.as_fields(check)) for check in (bad, good)]
    outcomes += [gpu_check.Outcome("ops", "Correctness", results, 2.0, "cut after 90 s")]
    gpu_report.write(tmp_path, gpu_check.environment(CPU), outcomes)
    text = (tmp_path / "gpu_check.md").read_text()
    assert "1 of 2 checks passed" in text
    assert "- FAILED op float32 [1]: 0.5, allowed 0.1 why" in text
    assert "- Correctness: cut after 90 s" in text
    assert "| op | float32 | 2 | 0.5 | 0.1 |" in text
    assert "| forward | bfloat16 | B=2 T=200 H=2 D=64 |" in text
    assert f"### dropout: gptdist, backend {backends.choose('dropout', CPU, torch.bfloat16).backend}" in text
    assert "| tiny | PyTorch, eager | 64 |" in text
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [section["name"] for section in found["sections"]] == ["attention-times", "training", "times", "ops"]
    assert gpu_check.failed(outcomes)
    assert not gpu_check.failed(outcomes[:-1])


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def python(text: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(text)]


def test_deadlines_and_crashes(tmp_path, monkeypatch):
    """A section that hangs is killed with what it started and keeps its results; one that crashes says so."""
    grandchild = tmp_path / "grandchild"
    hangs = f"""
        import subprocess, sys, time
        open({str(grandchild)!r}, "w").write(str(subprocess.Popen(["sleep", "60"]).pid))
        open(sys.argv[1], "w").write('["check", {{"ok": true}}]\\n["check", {{"ok"')
        time.sleep(60)
    """
    crashes = "raise SystemExit('an illegal address')"
    texts = {"ops": hangs, "attention": crashes}
    section = gpu_sections.Section("title", None, 4.0)
    monkeypatch.setattr(gpu_check, "SECTIONS", dict.fromkeys(("ops", "attention", "times"), section))
    monkeypatch.setattr(gpu_check, "LEAST_S", 0.5)
    saved = []

    def command(name, device, results):
        if name == "times":
            raise FileNotFoundError("compute-sanitizer is not here")
        return [*python(texts[name]), str(results)]

    start = time.monotonic()
    outcomes = gpu_check.run_all(CPU, 60, lambda outcomes: saved.append(len(outcomes)), command)
    assert time.monotonic() - start < 30
    assert saved == [1, 2, 3]
    assert outcomes[0].results == [("check", {"ok": True})]
    notes = [outcome.note for outcome in outcomes]
    assert notes == ["cut after 4 s", "ended with exit code 1: an illegal address", "compute-sanitizer is not here"]
    assert gpu_check.failed(outcomes)
    assert not is_running(int(grandchild.read_text()))


def test_a_used_up_budget_leaves_sections_out():
    outcomes = gpu_check.run_all(CPU, 1.0, lambda outcomes: None, command=None)
    assert len(outcomes) == len(gpu_sections.SECTIONS)
    assert {outcome.note for outcome in outcomes} == {"left out: the budget of 1 s is used up"}
    assert gpu_check.failed(outcomes)


def test_limits_fit_the_budget():
    """Nine minutes in all, sixteen seconds of which are for starting; what must not be cut has room."""
    assert gpu_check.BUDGET_S <= 525
    kept = [section.limit_s for section in list(gpu_sections.SECTIONS.values())[:4]]
    assert sum(kept) + 90 < gpu_check.BUDGET_S  # 90: the build


def test_sanitizer_summary(tmp_path, monkeypatch):
    section = gpu_sections.Section("memcheck", None, 30.0, tool="memcheck")
    monkeypatch.setattr(gpu_check, "SECTIONS", {"memcheck": section})
    said = python("print('========= ERROR SUMMARY: 0 errors')")
    (outcome,) = gpu_check.run_all(CPU, 60, lambda outcomes: None, lambda *args: said)
    assert outcome.of("sanitizer") == [{"tool": "memcheck", "summary": "ERROR SUMMARY: 0 errors"}]


# the whole


WITHOUT_PACKAGES = """
import sys
ABSENT = {"deepspeed", "gguf", "hypothesis", "jsonargparse", "matplotlib", "ninja", "peft", "pybind11", "pytest",
          "rich", "safetensors", "tensorboard", "tiktoken", "tokenizers", "transformers", "yaml"}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)
sys.meta_path = [Without(finder) for finder in sys.meta_path]
import runpy
runpy.run_module("benchmarks.gpu_check", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("section", ["training", "attention-times"])
def test_torch_is_all_that_it_needs(section, tmp_path):
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "-c", WITHOUT_PACKAGES, "--section", section, "--device", "cpu"]
    done = subprocess.run([*command, "--results", str(results)], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert results.read_text().count("\n") >= 3


@pytest.mark.long
def test_all_of_it_at_tiny_sizes(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1, done.stderr  # no kernels here
    assert len(list(tmp_path.iterdir())) <= 8
    sections = json.loads((tmp_path / "gpu_check.json").read_text())["sections"]
    assert {section["name"] for section in sections} == set(gpu_sections.SECTIONS)
    assert all(not section["note"] for section in sections if not section["name"].endswith("check"))
    found = [fields for section in sections for kind, fields in section["results"] if kind == "check"]
    assert all(fields["name"].startswith("backend of ") for fields in found if not fields["ok"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu_is_exit_code_3():
    result = subprocess.run(
        ["bash", "benchmarks/gpu_check.sh"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 3
    assert "gpu_check: no GPU" in result.stderr
