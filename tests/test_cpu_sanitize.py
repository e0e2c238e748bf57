"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: pytest -m long tests/test_cpu_sanitize.py."""

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "tests/cpu_sanitize.cpp"
EMULATED = "tests/cpu_emulated.cpp"
KERNELS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp"))
FLAGS = ["-std=c++20", "-O1", "-g1", "-fno-math-errno", "-fno-trapping-math", "-I", "csrc"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture
def sanitizing(tmp_path) -> list[str]:
    """The command that compiles with the sanitizers, in ROOT."""
    command = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS, *SANITIZE]
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C++ compiler: {command[0]} is not found")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}\n")
    if subprocess.run([*command, probe, "-o", tmp_path / "probe"], cwd=ROOT, capture_output=True).returncode != 0:
        pytest.skip(f"{command[0]} has no sanitizers")
    return command


def levels(program: Path) -> list[str]:
    """Those that the program ran, each a line of its output."""
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


@pytest.mark.long
def test_no_kernel_leaves_its_buffers_or_the_language(sanitizing, tmp_path):
    subprocess.run([*sanitizing, PROGRAM, *KERNELS, "-o", tmp_path / "kernels"], cwd=ROOT, check=True)
    assert "level 0" in levels(tmp_path / "kernels")


@pytest.mark.long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX-512 is x86-64's")
def test_nor_does_one_for_avx512_on_any_x86(sanitizing, tmp_path):
    parts = [PROGRAM, *(path for path in KERNELS if "avx512" not in path)]
    for isa in (2, 3):
        parts.append(str(tmp_path / f"level{isa}.o"))
        subprocess.run([*sanitizing, "-Wno-psabi", f"-DGPTDIST_ISA={isa}", "-c", EMULATED, "-o", parts[-1]],
                       cwd=ROOT, check=True)
    subprocess.run([*sanitizing, "-DGPTDIST_EMULATED", *parts, "-o", tmp_path / "emulated"], cwd=ROOT, check=True)
    assert levels(tmp_path / "emulated")[-2:] == ["level 2", "level 3"]
