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
        backends.BUILD_ERROR.write_text("_C_cuda: no nvcc\n_C: no C++ compiler: c++ is not found\n")
        assert backends.choose("bias_gelu", "cpu") == ("reference", "not built: no C++ compiler: c++ is not found")
        backends.library_problem.cache_clear()
        backends.LIBRARY.write_text("not a library")
        assert "does not load" in backends.choose("bias_gelu", "cpu").reason
    finally:
        backends.library_problem.cache_clear()


@pytest.fixture
def cuda_torch(monkeypatch):
    """A torch that sees one GPU of compute capability 9.0; no library is touched."""
    monkeypatch.delenv("GPTDIST_OPS", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(backends, "cuda_library_problem", lambda: "")
    monkeypatch.setattr(backends, "cuda_versions", lambda: (13000, 13010))
    backends.cuda_problem.cache_clear()
    yield
    backends.cuda_problem.cache_clear()


@pytest.mark.usefixtures("cuda_torch")
def test_reasons_on_cuda(monkeypatch):
    assert backends.choose("layer_norm", "cuda", torch.float16).backend == "cuda"
    assert backends.choose("layer_norm", torch.device("cuda", 0)).reason == (
        "takes float32, bfloat16, float16; width 64 to 16384 in multiples of 8"
    )
    assert backends.choose("layer_norm", "cuda", torch.float64).reason == "the cuda kernel does not take torch.float64"
    assert backends.choose("layer_norm", "cuda", None, backends.norm_misfit(20)).reason == (
        "width 20 is no multiple of 8 from 64 to 16384"
    )
    assert backends.choose("rope", "cuda") == ("reference", "no cuda kernel for this op")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backends.cuda_problem.cache_clear()
    assert backends.choose("layer_norm", "cuda") == ("reference", "no CUDA device is visible")


@pytest.mark.usefixtures("cuda_torch")
def test_old_gpu_goes_to_the_reference(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert backends.choose("dropout", "cuda:0") == (
        "reference",
        "GPU 0 has compute capability 7.5, the kernels need 8.0",
    )


@pytest.mark.usefixtures("cuda_torch")
@pytest.mark.parametrize(("driver", "fits"), [(12080, False), (13000, True), (13020, True), (14000, True), (0, False)])
def test_driver_must_be_of_the_runtimes_major_version(monkeypatch, driver, fits):
    monkeypatch.setattr(backends, "cuda_versions", lambda: (13000, driver))
    choice = backends.choose("dropout", "cuda")
    assert (choice.backend == "cuda") == fits
    if not fits:
        got = backends.version(driver)
        assert choice.reason == f"the driver is for CUDA {got}, _C_cuda.so was built with CUDA 13.0"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_is_a_reason(monkeypatch):
    monkeypatch.delenv("GPTDIST_OPS", raising=False)
    assert backends.choose("layer_norm", "cuda") == ("reference", "this torch is built without CUDA")


@pytest.mark.parametrize("width", [8, 16, 800])
def test_widths_that_fit_have_no_reason(width):
    assert backends.width_misfit(width) == ""
    assert bool(backends.norm_misfit(width)) == (width != 800)


def test_aligned_copies_only_what_must_be():
    x = torch.randn(4, 8)
    assert backends.aligned(x) is x
    for other in (x.t(), torch.randn(33)[1:].view(4, 8)):
        copy = backends.aligned(other)
        assert torch.equal(copy, other)
        assert copy.is_contiguous()
        assert copy.data_ptr() % backends.ALIGNMENT == 0


def test_doctor(capsys, monkeypatch):
    monkeypatch.setenv("GPTDIST_OPS", "reference")
    assert doctor.run(json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["op"] for row in found["ops"]} == set(backends.OPS)
    assert all("forced" in row["cpu"]["reason"] for row in found["ops"])
    assert found["torch"]["version"] == torch.__version__
    assert found["cpu_training"]["physical_cores"] >= 1
    assert {type(value) for value in found["cpu_training"].values()} == {int, bool}
    assert set(found["cuda_library"]) == {"path", "problem", "runtime", "driver"}
    assert doctor.run() == 0
    said = capsys.readouterr().out
    assert "bias_gelu" in said
    for line in ("physical cores", "denormals", "freed memory"):
        assert line in said


def test_importing_ops_loads_no_library():
    code = (
        "import gptdist.ops.backends as b\n"
        "for load in (b.library_problem, b.cuda_library_problem): assert load.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
