"""What the tests of launch/ share: a run that is slow enough to be disturbed, and how it is watched and compared."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.chaos import children
from gptdist import config as config_module
from gptdist.checkpoint import layout
from gptdist.checkpoint.stream import TensorReader
from tests.conftest import ROOT
from tests.training import tiny_config, train_rows

MULTINODE = "launch/multinode.sh"
# Some 30 ms a step on one core, so that there is a middle to be killed in; a checkpoint every 5 steps.
SLOW = ("--model.width=64", "--model.context=64", f"--train.tokens_per_step={11 * 64}", "--optim.lr=1e-3",
        "--checkpoint.every=5", "--eval.every=0", "--run.log_every=1")
# `python` in launch/ is the one that runs the tests.
ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
QUICK = ("--last-call", "10", "--keep-alive", "9", "--grace", "60")  # of the launcher


def write_config(path: Path, data: Path, run: Path, *overrides: str) -> Path:
    path.write_text(config_module.to_yaml(tiny_config(data, run, *SLOW, *overrides)))
    return path


def start(*arguments: str, prefix: Sequence[str] = (), log: Path, **env: str) -> subprocess.Popen:
    """`bash launch/multinode.sh ARGUMENTS`, its output in `log`."""
    return subprocess.Popen(
        [*prefix, "bash", MULTINODE, *arguments], cwd=ROOT, stdout=log.open("ab"), stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, env=os.environ | ENV | env)


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and its workers at once, as when a machine goes down."""
    for pid in tree(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=60)


def tree(pid: int) -> list[int]:
    """A process and all that it started."""
    return [pid, *(found for child in children(pid) for found in tree(child))]


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float = 600,
               logs: Sequence[Path] = ()) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s\n{tails(logs)}"
        time.sleep(0.02)


def tails(logs: Sequence[Path]) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in logs if log.exists())


def steps_done(run: Path) -> int:
    rows = train_rows(run) if (run / "metrics.jsonl").exists() else []
    return rows[-1]["step"] if rows else 0


def exit_record(run: Path) -> dict:
    try:
        return json.loads((run / "exit.json").read_text())
    except OSError:
        return {}


def assert_same_weights(run: Path, reference: Path, *, atol: float) -> None:
    ours, theirs = (layout.latest(path / "checkpoints") for path in (run, reference))
    assert ours.name == theirs.name
    a, b = TensorReader(ours), TensorReader(theirs)
    assert sorted(a.index) == sorted(b.index)
    for name in a.index:
        torch.testing.assert_close(a.read(name), b.read(name), rtol=0, atol=atol,
                                   msg=lambda text, name=name: f"{name}: {text}")
