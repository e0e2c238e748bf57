"""Which backend runs and why; doctor shows it."""

import json
import subprocess
import sys

import pytest
import torch

from gptdist import doctor
from gptdist.errors import UserError
from gptdist.ops import backends, bias_gelu


def test_reference_can_be_forced_between_calls(monkeypatch):
    x = torch.randn(3, 5)
    monkeypatch.delenv("GPTDIST_OPS", raising=False)
    first = bias_gelu(x)
    monkeypatch.setenv("GPTDIST_OPS", "reference")
    assert backends.choose("bias_gelu", "cpu") == ("reference", "forced by GPTDIST_OPS=reference")
    torch.testing.assert_close(bias_gelu(x), first)


def test_unknown_setting_is_the_users_error(monkeypatch):
    monkeypatch.setenv("GPTDIST_OPS", "fast")
    with pytest.raises(UserError, match="GPTDIST_OPS='fast' is unknown"):
        backends.choose("bias_gelu", "cpu")


def test_reasons(monkeypatch, tmp_path):
    monkeypatch.delenv("GPTDIST_OPS", raising=False)
    assert backends.choose("rope", "cpu") == ("reference", "no cpu kernel for this op")
    assert "does not take torch.float64" in backends.choose("bias_gelu", "cpu", torch.float64).reason
    monkeypatch.setattr(backends, "LIBRARY", tmp_path / "_C.so")
    monkeypatch.setattr(backends, "BUILD_ERROR", tmp_path / "_build_error.txt")
    backends.library_problem.cache_clear()
    try:
        assert "is missing" in backends.choose("bias_gelu", "cpu").reason
        backends.library_problem.cache_clear()
        backends.BUILD_ERROR.write_text("no C++ compiler: c++ is not found\n")
        assert backends.choose("bias_gelu", "cpu") == ("reference", "not built: no C++ compiler: c++ is not found")
        backends.library_problem.cache_clear()
        backends.LIBRARY.write_text("not a library")
        assert "does not load" in backends.choose("bias_gelu", "cpu").reason
    finally:
        backends.library_problem.cache_clear()


def test_doctor(capsys, monkeypatch):
    monkeypatch.setenv("GPTDIST_OPS", "reference")
    assert doctor.run(json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["op"] for row in found["ops"]} == set(backends.OPS)
    assert all("forced" in row["cpu"]["reason"] for row in found["ops"])
    assert found["torch"]["version"] == torch.__version__
    assert doctor.run() == 0
    assert "bias_gelu" in capsys.readouterr().out


def test_importing_ops_loads_no_library():
    code = "import gptdist.ops.backends as b; assert b.library_problem.cache_info().currsize == 0"
    subprocess.run([sys.executable, "-c", code], check=True)
