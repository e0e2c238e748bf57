"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: pytest -m long tests/test_cpu_sanitize.py."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-O1", "-g1", "-fno-math-errno", "-fno-trapping-math", "-I", "csrc"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C++ compiler: {command[0]} is not found")
    return command


@pytest.mark.long
def test_no_kernel_leaves_its_buffers_or_the_language(tmp_path):
    command = compiler()
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}\n")
    if subprocess.run([*command, *SANITIZE, probe, "-o", tmp_path / "probe"], capture_output=True).returncode != 0:
        pytest.skip(f"{command[0]} has no sanitizers")
    sources = ["tests/cpu_sanitize.cpp", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))]
    program = tmp_path / "sanitize"
    subprocess.run([*command, *FLAGS, *SANITIZE, *sources, "-o", program], cwd=ROOT, check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "level 0" in result.stdout
