"""benchmarks/kernels: the clock, what a row says, the command itself."""

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import kernels, ops_timed, timing
from benchmarks.ops_timed import OURS, Op, Way
from tests.conftest import ROOT

CPU = torch.device("cpu")
LIMITS = kernels.Limits(copy=1e9, matmul={"float32": 1e12, "bfloat16": 2e12})


def test_times_are_medians_of_alternating_calls():
    calls, pauses = [], iter([0.0] * timing.WARM_UPS + [0.002, 0.02, 0.002])

    def first():
        calls.append("a")
        time.sleep(next(pauses))

    found = timing.alternating({"a": first, "b": lambda: calls.append("b")}, CPU, repeats=3, limit_s=60)
    assert calls == ["a"] * timing.WARM_UPS + ["b"] * timing.WARM_UPS + ["a", "b"] * 3
    assert 2.0 <= found["a"].ms < 20.0  # the median, not the mean
    assert found["b"].ms < found["a"].ms


def test_a_function_that_refuses_says_why():
    def refuses():
        raise RuntimeError("No available kernel.\nAborting execution.")

    found = timing.alternating({"good": lambda: None, "bad": refuses}, CPU, repeats=3, limit_s=1)
    assert found["bad"] == timing.Time(None, "No available kernel.")
    assert found["good"].ms is not None


def test_a_slow_function_gets_few_rounds():
    calls = []
    timing.alternating({"slow": lambda: (calls.append(0), time.sleep(0.01))}, CPU, repeats=1000, limit_s=0.05)
    assert timing.FEWEST_ROUNDS <= len(calls) - timing.WARM_UPS <= 6


def row(**changes) -> kernels.Row:
    times = {OURS: timing.Time(2.0), "PyTorch": timing.Time(3.0), "flash": timing.Time(None, "no GPU")}
    fields = dict(op="op", direction="forward", dtype="float32", shape="[1]", backend="cpu", bytes=1_000_000,
                  flops=10**9, limit_ms=1.0, times=times, error=1e-7)
    return kernels.Row(**fields | changes)


def test_a_row_says_rates_share_and_ratio():
    text = kernels.markdown([row()])
    assert "| forward | float32 | [1] | 2.000 | 3.000 | - | 1.50 (PyTorch) | 0.5 | 0.5 | 50% | 1.0e-07 |" in text
    assert "- op forward float32 [1], flash: no GPU" in text


def test_a_row_without_a_time():
    text = kernels.markdown([row(times={OURS: timing.Time(None, "out of memory"), "PyTorch": timing.Time(3.0)})])
    assert "| forward | float32 | [1] | - | 3.000 | - | - | - | - | 1.0e-07 |" in text


def test_the_limit_is_the_longer_of_two_times():
    timed = ops_timed.Timed("op", "forward", "bfloat16", "[1]", bytes=2_000_000, flops=0, functions={})
    assert LIMITS.ms(timed) == 2.0
    timed = ops_timed.Timed("op", "forward", "bfloat16", "[1]", bytes=2_000_000, flops=10**10, functions={})
    assert LIMITS.ms(timed) == 5.0


@pytest.mark.parametrize("name", ops_timed.FAMILIES)
def test_every_op_at_its_small_shape(name):
    """Forward, and backward where there is one, beside PyTorch; our numbers are those of float64, to the dtype."""
    torch.manual_seed(0)
    families = {name: ops_timed.tiny(ops_timed.FAMILIES[name])}
    peers = ops_timed.PEERS - {"compiled"}
    found = list(kernels.rows(CPU, LIMITS, families=families, repeats=1, limit_s=0.0, peers=peers))
    one_way = name in ("decode_attention", "few_rows_linear", "adamw_", "grad_norm")
    assert [r.direction for r in found] == (["forward"] if one_way else ["forward", "backward"])
    for r in found:
        assert r.best_peer is not None
        assert len(r.times) >= 3
        assert all(time.ms is not None for time in r.times.values()), r
        assert 0 <= r.error < 1e-2
        assert r.bytes > 0


def test_a_wrong_op_has_a_large_error():
    x = torch.randn(4, 8, dtype=torch.float32)
    op = Op("[4, 8]", Way(lambda x: x * (1.5 if x.dtype == torch.float32 else 1.0), (x,)), {}, (1, 1))
    assert ops_timed.errors(op) == {"forward": pytest.approx(0.5), "backward": pytest.approx(0.5)}


def test_attention_that_stores_its_scores_is_not_run_on_long_sequences(monkeypatch):
    monkeypatch.setattr(ops_timed, "LARGEST_SCORES", 1000)
    families = {"attention": ops_timed.tiny(ops_timed.FAMILIES["attention"])}
    forward, _ = kernels.rows(CPU, LIMITS, families=families, repeats=1, limit_s=0.0, peers={"SDPA", "math"})
    assert forward.times["math"].refusal.startswith("not run: ")
    assert forward.times["SDPA"].ms is not None


def test_command(tmp_path):
    command = [sys.executable, "-m", "benchmarks.kernels", "--op", "bias_gelu", "--no-compile", "--repeats", "3",
               "--dtype", "float32", "bfloat16"]
    command += ["--json", str(tmp_path / "k.json"), "--png", str(tmp_path / "k.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "### bias_gelu: gptdist, backend" in done.stdout
    assert "limits    copy " in done.stdout
    found = json.loads((tmp_path / "k.json").read_text())
    assert {(r["dtype"], r["direction"]) for r in found["rows"]} == {
        (dtype, direction) for dtype in ("float32", "bfloat16") for direction in ("forward", "backward")
    }
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_compiled_peers():
    families = {name: ops_timed.tiny(ops_timed.FAMILIES[name]) for name in ("attention", "bias_gelu")}
    for r in kernels.rows(CPU, LIMITS, families=families, repeats=1, limit_s=0.0, peers={"compiled"}):
        assert r.times["compiled"].ms is not None, r.times["compiled"].refusal
