"""The install: a failed build leaves a working package and names its cause; a good one is not repeated."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from gptdist.ops import backends
from tests import cuda_vm

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "csrc", "gptdist")
SETTINGS = {"GPTDIST_CUDA": "0", "GPTDIST_CUDA_ARCHS": "", "GPTDIST_PTXVM": "", "GPTDIST_REQUIRE_EXT": ""}
USE_OPS = """
import torch
from gptdist import doctor, ops
from gptdist.ops import backends
x = torch.randn(3, 4, requires_grad=True)
ops.bias_gelu(x).sum().backward()
print(backends.choose("bias_gelu", "cpu").reason)
assert doctor.collect()["library"]["path"] is None
"""

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources, without anything built."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build*"))
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


def build(tree, *, check=True, **environment):
    return run(tree, "setup.py", "build_ext", "--inplace", check=check, **environment)


def run(tree, *arguments, check=True, **environment):
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env={**os.environ, **SETTINGS, "PYTHONPATH": str(tree), "GPTDIST_OPS": "", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def wheel(tree, **environment):
    """Install into tree/site from a wheel; returns that folder."""
    pip = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target", "site", "."]
    run(tree, *pip, **environment)
    return tree / "site"


@pytest.mark.long
def test_missing_compiler_leaves_a_working_package(tree):
    cause = "'/bin/false --version' exits with 1"
    lines = messages(build(tree, CXX="/bin/false"))
    assert len(lines) == 1
    assert cause in lines[0]
    assert "reference ops" in lines[0]
    assert cause in (tree / "gptdist" / "_build_error.txt").read_text()
    assert not (tree / "gptdist" / "_C.so").exists()
    assert cause in run(tree, "-c", USE_OPS).stdout


def test_required_extension_fails_the_build(tree):
    result = build(tree, check=False, CXX="no-such-c++", GPTDIST_REQUIRE_EXT="1")
    assert result.returncode != 0
    assert "no-such-c++ is not found" in result.stderr
    assert "GPTDIST_REQUIRE_EXT=1" in result.stderr


@needs_compiler
@pytest.mark.long
def test_compile_error_is_named_and_a_later_build_clears_it(tree):
    source = tree / "csrc" / "cpu" / "bias_gelu.cpp"
    good = source.read_text()
    source.write_text(good + "\nint broken = undeclared_name;\n")
    build(tree)
    note = tree / "gptdist" / "_build_error.txt"
    assert "undeclared_name" in note.read_text()
    assert len(note.read_text().splitlines()) == 1

    source.write_text(good)
    build(tree)
    assert not note.exists()
    assert (tree / "gptdist" / "_C.so").exists()

    objects = sorted((tree / "build").rglob("*.o"))
    assert objects
    before = [path.stat().st_mtime_ns for path in objects]
    build(tree)
    assert [path.stat().st_mtime_ns for path in objects] == before  # nothing is compiled again


@needs_compiler
@pytest.mark.long
def test_wheel_carries_the_library_or_the_cause(tree):
    site = wheel(tree)
    assert (site / "gptdist" / "_C.so").exists()
    assert not (site / "gptdist" / "_build_error.txt").exists()
    shutil.rmtree(site)
    site = wheel(tree, CXX="/bin/false")
    assert not (site / "gptdist" / "_C.so").exists()
    assert "exits with 1" in (site / "gptdist" / "_build_error.txt").read_text()


def dynamic_symbols(name, *options):
    """What `nm` says of the built library `name`."""
    library = ROOT / "gptdist" / f"{name}.so"
    if shutil.which("nm") is None:
        pytest.skip("no nm (binutils)")
    if not library.exists():
        pytest.skip(f"gptdist/{name}.so is not built")
    result = subprocess.run(["nm", "-DC", *options, library], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


@pytest.mark.parametrize("name", ["_C", "_C_cuda", "_vm"])
def test_libraries_use_the_stable_abi_only(name):
    symbols = dynamic_symbols(name, "--undefined-only")
    assert [line for line in symbols if "c10::" in line or "at::" in line or " Py" in line] == []


# the CUDA library

NOTHING = 'extern "C" int nothing() { return 0; }\n'
KERNEL = """
#include <cuda_runtime.h>
__global__ void one(int* p) { *p = 1; }
extern "C" int launch() { return cudaLaunchKernel((const void*)one, dim3(1), dim3(1), nullptr, 0, 0); }
"""


@pytest.fixture
def small(tree):
    """A tree whose sources compile at once."""
    for source in (*(tree / "csrc").glob("ops*.cpp"), *(tree / "csrc" / "cpu").glob("*.cpp")):
        source.write_text(NOTHING.replace("nothing", source.stem))
    for kernel in (tree / "csrc" / "cuda").glob("*.cu"):
        kernel.unlink()
    (tree / "csrc" / "cuda" / "one.cu").write_text(KERNEL)
    return tree


def fake_nvcc(tree, compiling):
    """A CUDA_HOME whose nvcc writes down how it is called and then runs the shell command `compiling`."""
    nvcc = tree / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"""#!/bin/sh
case "$*" in
  *--list-gpu-code*) printf 'sm_80\\nsm_90\\nsm_120\\n';;
  *--dryrun*) echo '#$ LIBRARIES=  "-L/nowhere"' >&2;;
  *) echo "$*" >> {tree}/commands; {compiling};;
esac
""")
    nvcc.chmod(0o755)
    return str(tree / "toolkit")


def messages(result):
    return [line for line in result.stderr.splitlines() if line.startswith("gptdist: ")]


@needs_compiler
def test_failed_cuda_build_leaves_the_c_library(small):
    package = small / "gptdist"
    (package / "_C_cuda.so").write_text("of older sources")
    home = fake_nvcc(small, "echo 'one.cu(3): error: no such thing'; echo 'one.cu(4): error: nor this'; exit 2")
    result = build(small, GPTDIST_CUDA="", CUDA_HOME=home)
    assert messages(result) == [
        "gptdist: _C_cuda: the build failed: one.cu(3): error: no such thing; its ops run on the PyTorch reference ops"
    ]
    assert (package / "_build_error.txt").read_text() == "_C_cuda: the build failed: one.cu(3): error: no such thing\n"
    assert (package / "_C.so").exists()
    assert not (package / "_C_cuda.so").exists()
    required = build(small, check=False, GPTDIST_CUDA="1", CUDA_HOME=home)
    assert required.returncode != 0
    assert "GPTDIST_CUDA=1" in messages(required)[-1]
    assert (package / "_C.so").exists()


@needs_compiler
def test_without_nvcc_there_is_no_cuda_library_and_no_error(small):
    assert messages(build(small, GPTDIST_CUDA="", CUDA_HOME=str(small))) == []
    assert (small / "gptdist" / "_C.so").exists()
    assert not (small / "gptdist" / "_build_error.txt").exists()
    required = build(small, check=False, GPTDIST_CUDA="1", CUDA_HOME=str(small))
    assert required.returncode != 0
    assert f"no nvcc: {small}/bin/nvcc does not run" in messages(required)[0]


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py as a module, without its call of setup()."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("gptdist_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("archs", "code"),
    [
        ("", "[compute_80,sm_80,sm_90,sm_120]"),  # of the default ones those that nvcc knows
        ("90", "[compute_80,sm_90]"),
        ("80; 90", "[compute_80,sm_80,sm_90]"),
        ("ptx", "[compute_80]"),
    ],
)
def test_architectures_can_be_narrowed(setup_py, tmp_path, monkeypatch, archs, code):
    monkeypatch.setenv("CUDA_HOME", fake_nvcc(tmp_path, "exit 1"))
    monkeypatch.setenv("GPTDIST_CUDA_ARCHS", archs)
    assert setup_py.code_flags() == ["-gencode", f"arch=compute_80,code={code}"]


def test_architecture_that_this_nvcc_does_not_know_is_named(setup_py, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", fake_nvcc(tmp_path, "exit 1"))
    monkeypatch.setenv("GPTDIST_CUDA_ARCHS", "100")
    with pytest.raises(setup_py.BuildProblem, match="makes no code for sm_100"):
        setup_py.code_flags()


@pytest.mark.parametrize("archs", ["8x", "70", "80;;90", "ptx;80", "sm_80", "8.0", ";"])
def test_malformed_architectures_are_the_users_error(setup_py, monkeypatch, archs):
    monkeypatch.setenv("GPTDIST_CUDA_ARCHS", archs)
    with pytest.raises(SystemExit, match=re.escape(f"GPTDIST_CUDA_ARCHS={archs!r}")) as error:
        setup_py.requested_archs()
    assert "expected numbers as in '80;90', or 'ptx' alone" in str(error.value)


def test_settings_without_meaning_build_nothing(small):
    for setting in ({"GPTDIST_CUDA_ARCHS": "8x"}, {"GPTDIST_CUDA": "yes"}):
        result = build(small, check=False, **setting)
        assert result.returncode != 0
        assert next(iter(setting)) in messages(result)[0]
        assert not (small / "gptdist" / "_C.so").exists()


@needs_compiler
def test_half_written_library_is_linked_again(small):
    build(small)
    (linked,) = (small / "build").rglob("_C.so")
    whole = linked.read_bytes()
    linked.write_bytes(whole[:100])
    build(small)
    assert (small / "gptdist" / "_C.so").read_bytes() == linked.read_bytes()
    assert len(linked.read_bytes()) == len(whole)
    assert list((small / "gptdist").glob("*.new")) == []


@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_ptx_and_the_wanted_machine_code_are_in_the_library(small):
    if cuda_vm.cuobjdump() is None:
        pytest.skip("no cuobjdump")
    assert messages(build(small, GPTDIST_CUDA="1", GPTDIST_CUDA_ARCHS="80;90")) == []
    library = small / "gptdist" / "_C_cuda.so"
    listed = subprocess.run(
        [cuda_vm.cuobjdump(), "-lelf", "-lptx", library], capture_output=True, text=True, check=True
    ).stdout
    assert sorted(re.findall(r"sm_\d+\.\w+", listed)) == ["sm_80.cubin", "sm_80.ptx", "sm_90.cubin"]


def test_cuda_library_loads_without_a_gpu_and_hides_its_runtime():
    if not backends.CUDA_LIBRARY.exists():
        pytest.skip("gptdist/_C_cuda.so is not built")
    assert backends.cuda_library_problem() == ""
    # A runtime of its own that other libraries could see would be taken for theirs, and theirs for it.
    assert [line for line in dynamic_symbols("_C_cuda", "--defined-only") if "cuda" in line.lower()] == []
    assert [line for line in dynamic_symbols("_C_cuda", "--undefined-only") if " cuda" in line] == []
    assert [line for line in dynamic_symbols("_vm", "--defined-only") if " cuda" in line] == []
