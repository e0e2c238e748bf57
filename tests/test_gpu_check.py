"""benchmarks/gpu_check on a machine without a GPU: its exit code, and its checks and report on the test device."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu_check
from tests import cuda_vm
from tests.conftest import ROOT

SMALL = gpu_check.Shapes(rows=(1, 9), widths=(64, 72), vocabularies=(1, 17), blocks=((1, 1, 1), (2, 5, 63), (2, 3, 72)),
                         decode=((2, 1, 2, 1, 64, 70), (1, 20, 1, 2, 128, 0)))
CPU = torch.device("cpu")


@pytest.fixture
def device():
    return cuda_vm.device()


def test_checks_pass_on_the_test_device(device):
    with device.run(races=False) as log:
        checks = gpu_check.correctness(CPU, SMALL)
    assert log.launches
    assert [check for check in checks if not check.ok] == []
    names = {"layer_norm", "residual_layer_norm", "bias_gelu", "cross_entropy", "dropout", "decode_attention"}
    assert names <= {check.name for check in checks}


def test_checks_notice_the_reference():
    """Without kernels the comparisons say nothing, and the run fails."""
    failed = [check.name for check in gpu_check.check_backends(CPU) if not check.ok]
    assert "backend of layer_norm" in failed


def test_wrong_numbers_fail():
    good, bad = [torch.ones(3)], [torch.tensor([1.0, 1.0, 1.001])]
    assert gpu_check.largest_error(bad, [good[0].double()]) == pytest.approx(1e-3, rel=1e-2)
    assert not gpu_check.Check("op", "float32", "", float("nan"), 1.0).ok
    assert gpu_check.largest_error([torch.tensor([float("nan")])], [torch.ones(1).double()]) != 0


def test_report(device, tmp_path):
    timed = tuple((make, ((4, 64),)) for make, _ in gpu_check.TIMED)
    with device.run(races=False):
        times = gpu_check.timings(CPU, 2, timed, (torch.bfloat16,))
    assert len(times) == 11
    bad = gpu_check.Check("op", "float32", "[1]", 0.5, 0.1, "why")
    checks = [bad, gpu_check.Check("op", "float32", "[2]", 0, 0.1)]
    gpu_check.write(tmp_path, gpu_check.environment(CPU), checks, times, 1e9)
    text = (tmp_path / "gpu_check.md").read_text()
    assert "1 of 2 checks passed" in text
    assert "- FAILED op float32 [1]: 0.5, allowed 0.1 why" in text
    assert "| op | float32 | 2 | 0.5 | 0.1 |" in text
    assert "| dropout | bfloat16 | [4, 64] |" in text
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [check["ok"] for check in found["checks"]] == [False, True]
    assert len(found["times"]) == len(times)


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
