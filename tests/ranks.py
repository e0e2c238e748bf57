"""Ranks without a launcher, forked from a process that has imported torch and DeepSpeed: the imports take each rank
that is started on its own longer than the runs of most tests do."""

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.training import run_worker

CONTEXT = multiprocessing.get_context("forkserver")
# Dynamo: the first optimizer imports it. DeepSpeed: it looks for GPUs, after which no fork could use one.
IMPORTS = ["tests.training", "torch._dynamo", *([] if torch.cuda.is_available() else ["deepspeed"])]
CONTEXT.set_forkserver_preload(IMPORTS)


class Ranks:
    """The processes of a world of its own, in each `work(*arguments)`, a module's function.

    What they print is in `out` and `err`, in `folder`, which is made.
    """

    def __init__(self, world: int, folder: Path, work: Callable[..., None], *arguments: object):
        folder.mkdir(parents=True)
        self.out, self.err = folder / "out.txt", folder / "err.txt"
        for path in (self.out, self.err):
            path.touch()
        self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent does
        where = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "localhost",
                 "MASTER_PORT": self._store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        start_server()
        self._processes = [
            CONTEXT.Process(target=_rank, args=(where | {"RANK": rank, "LOCAL_RANK": rank}, self.out, self.err, work,
                                                arguments), daemon=True) for rank in range(world)]
        for process in self._processes:
            process.start()

    def ended(self) -> bool:
        """Whether all have ended. Raises AssertionError, when the others are ended too, if one failed."""
        codes = [process.exitcode for process in self._processes]
        if any(codes):
            self._fail(f"exit codes {codes}")
        return None not in codes

    def wait(self, timeout_s: int = 600, until: Callable[[], bool] = lambda: False) -> None:
        """Until all have ended, or something is true. Raises AssertionError if one fails, or it takes too long."""
        deadline = time.monotonic() + timeout_s
        while not (until() or self.ended()):
            if time.monotonic() > deadline:
                self._fail(f"not done in {timeout_s} s")
            time.sleep(0.05)

    def _fail(self, why: str) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []
        raise AssertionError(f"{why}: {self.err.read_text()[-6000:]}")


def start_server() -> None:
    """The process that ranks are forked from, if it is not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # DeepSpeed compiles its Muon as it is imported: 2 s
        forkserver.ensure_running()


def _rank(where: dict[str, object], out: Path, err: Path, work: Callable[..., None], arguments: tuple) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.update({name: str(value) for name, value in where.items()})
    run_worker(work, *arguments)
