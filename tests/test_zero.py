"""single = zero1 = zero2 = zero3 = hsdp at world sizes 1 to 4, with uneven shares, accumulation, clipping and dropout;
and one run that goes on under every strategy, from checkpoint to checkpoint."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, torchrun
from tests.training import TINY, assert_same_curve, eval_losses, run_tiny, train_rows
from tests.zero_worker import CASES, CHAIN, DROPOUT

pytest.importorskip("deepspeed", reason="pip install --no-build-isolation deepspeed")

WORLDS = tuple(CASES)
FP32 = [(world, name) for world in WORLDS for name in CASES[world] if "bf16" not in name]
BF16 = [(world, name) for world in WORLDS for name in CASES[world] if "bf16" in name]


@pytest.fixture(scope="module", autouse=True)
def _no_compiler():
    """DeepSpeed decorates its Muon with torch.compile at import: 2 s in every process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        yield


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """The single-process reference, then every world size started once."""
    out = tmp_path_factory.mktemp("runs")
    run_tiny(dataset, out / "single", *DROPOUT)
    run_tiny(dataset, out / "chain", "--train.stop_at=2", *DROPOUT)
    for world in WORLDS:
        done = torchrun(world, "tests/zero_worker.py", str(dataset), str(out))
        assert done.returncode == 0, done.stderr[-6000:]
    run_tiny(dataset, out / "chain", *DROPOUT)
    return out


@pytest.mark.parametrize(("world", "name"), FP32)
def test_every_strategy_and_world_size_gives_the_single_curve(runs, world, name):
    rows = train_rows(runs / f"{name}-{world}")
    assert_same_curve(rows, train_rows(runs / "single")[:len(rows)])
    if len(rows) == 20:
        assert eval_losses(runs / f"{name}-{world}") == pytest.approx(eval_losses(runs / "single"), abs=1e-5)


@pytest.mark.parametrize(("world", "name"), BF16)
def test_bf16_stays_in_a_band_of_fp32(runs, world, name):
    """bf16 has 8 bits of mantissa: over 10 steps the losses stay within 0.02 nats of fp32's."""
    rows = train_rows(runs / f"{name}-{world}")
    assert_same_curve(rows, train_rows(runs / "single")[:len(rows)], loss=0.02, norm=0.1)


def test_one_run_goes_on_under_every_strategy(runs):
    """At world sizes 1, 1, 2, 3, 4, 1, under another strategy each time."""
    assert {strategy for part in CHAIN.values() for _, strategy in part} == {"fsdp", "hsdp", "zero1", "zero2", "zero3"}
    assert_same_curve(train_rows(runs / "chain"), train_rows(runs / "single"))


def test_resume_at_the_same_world_size_is_bitwise(runs):
    resumed, straight = train_rows(runs / "resumed-2"), train_rows(runs / "zero3-2")
    assert [(r["loss"], r["grad_norm"]) for r in resumed] == [(r["loss"], r["grad_norm"]) for r in straight]


@pytest.mark.parametrize("saved", ["zero1", "zero3"])
def test_a_save_in_the_background_has_the_state_of_its_step(runs, saved):
    """Saved while the next steps changed the partitions; another stage goes on from it."""
    assert_same_curve(train_rows(runs / f"background-{saved}"), train_rows(runs / "single")[8:10])


def test_init_from_takes_the_weights(runs):
    """From a run of 20 steps: the loss goes on from there, and not from log(vocabulary)."""
    first, last = train_rows(runs / "init-2")[0], train_rows(runs / "single")[-1]
    assert first["step"] == 1
    assert first["loss"] < last["loss"] + 0.3


def test_the_deepspeed_launcher_takes_the_same_yaml(dataset, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TINY | {"data": {"path": str(dataset)},
                                           "parallel": TINY["parallel"] | {"strategy": "zero2"}}))
    arguments = ["train", str(path), "--train.steps=4", "--eval.every=0"]
    launcher = shutil.which("deepspeed") or str(Path(sys.executable).with_name("deepspeed"))
    done = subprocess.run([launcher, "--num_gpus", "2", "--master_port", "29611", "--module", "gptdist", *arguments,
                           f"--run.dir={tmp_path / 'launcher'}"], capture_output=True, text=True, cwd=ROOT, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    single = run_tiny(dataset, tmp_path / "single", "--train.steps=4", "--eval.every=0")
    assert_same_curve(train_rows(tmp_path / "launcher"), single)


@pytest.mark.long
def test_deepspeeds_own_cpu_adam(dataset, runs):
    """Compiled at first use. It keeps its step counters in Python, which a resume restores."""
    done = torchrun(2, "tests/zero_worker.py", str(dataset), str(runs), "long", timeout_s=600)
    assert done.returncode == 0, done.stderr[-6000:]
    assert_same_curve(train_rows(runs / "cpuadam-2"), train_rows(runs / "single"))
