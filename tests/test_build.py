"""The install: a failed build leaves a working package and names its cause; a good one is not repeated."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "csrc", "gptdist")
USE_OPS = """
import torch
from gptdist import doctor, ops
from gptdist.ops import backends
x = torch.randn(3, 4, requires_grad=True)
ops.bias_gelu(x).sum().backward()
print(backends.choose("bias_gelu", "cpu").reason)
assert doctor.collect()["library"]["path"] is None
"""


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
        env={**os.environ, "PYTHONPATH": str(tree), "GPTDIST_OPS": "", **environment},
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
    result = build(tree, CXX="/bin/false")
    lines = [line for line in result.stderr.splitlines() if line.startswith("gptdist: ")]
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


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
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


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.long
def test_wheel_carries_the_library_or_the_cause(tree):
    site = wheel(tree)
    assert (site / "gptdist" / "_C.so").exists()
    assert not (site / "gptdist" / "_build_error.txt").exists()
    shutil.rmtree(site)
    site = wheel(tree, CXX="/bin/false")
    assert not (site / "gptdist" / "_C.so").exists()
    assert "exits with 1" in (site / "gptdist" / "_build_error.txt").read_text()


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm (binutils)")
def test_library_uses_the_stable_abi_only():
    library = ROOT / "gptdist" / "_C.so"
    if not library.exists():
        pytest.skip("gptdist/_C.so is not built")
    symbols = subprocess.run(["nm", "-DC", "--undefined-only", library], capture_output=True, text=True, check=True)
    unstable = [line for line in symbols.stdout.splitlines() if "c10::" in line or "at::" in line or " Py" in line]
    assert unstable == []
