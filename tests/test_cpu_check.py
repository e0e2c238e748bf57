"""benchmarks/cpu_check.sh: what it runs, where the results go, and what it says of a step that fails."""

import os
import subprocess

from tests.conftest import ROOT


def run(*steps, **env):
    return subprocess.run(["bash", "benchmarks/cpu_check.sh", *steps], cwd=ROOT, capture_output=True, text=True,
                          timeout=60, env=os.environ | env)


def test_steps_and_their_results(tmp_path):
    """With a python that says what it is to do, and cannot train."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$*"\n[ "$2" != benchmarks.train_cpu ]\n')
    python.chmod(0o755)
    (tmp_path / "tinyshakespeare.txt").touch()
    done = run(GPTDIST_VENV=str(tmp_path / "venv"), GPTDIST_DATA=str(tmp_path), OUT=str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("cpu_check: failed: train\n")
    said = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    modules = {"kernels": "kernels", "train": "train_cpu", "generate": "generate_cpu", "shakespeare": "shakespeare"}
    assert {f"cpu-{step}.md": f"-m benchmarks.{module}\n" for step, module in modules.items()}.items() <= said.items()
    assert said["cpu-precision.md"].startswith("-m benchmarks.precision --data ")
    for module in [*modules.values(), "precision", "train_cpu_scale"]:
        assert (ROOT / "benchmarks" / f"{module}.py").exists()


def test_what_cannot_be_done(tmp_path):
    assert run("nosuch").returncode == 2
    done = run("kernels", GPTDIST_VENV=str(tmp_path))
    assert done.returncode == 3
    assert "bash launch/test.sh makes it" in done.stderr
    done = run(GPTDIST_DATA=str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert "nothing/tinyshakespeare.txt here: set GPTDIST_DATA" in done.stderr
