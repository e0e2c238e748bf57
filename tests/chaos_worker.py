"""What the chaos test starts: the undisturbed runs, and jobs whose ranks have their imports when they start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.launcher import api

from benchmarks import chaos
from gptdist import cli
from gptdist import config as config_module
from gptdist.parallel.host import set_up_process
from gptdist.parallel.world import init_world
from gptdist.trainer import Trainer
from tests.ranks import CONTEXT, start_server

KILLS = 5  # of each strategy: a phase at least once, and in all at least four times


def main(data: Path, out: Path) -> None:
    """A job of two processes (conftest.Workers): for each strategy the run that nothing happens to."""
    for strategy in chaos.STRATEGIES:
        path = chaos.write_config(data, out / f"{strategy}-undisturbed", strategy, chaos.steps_of(KILLS))
        config = config_module.load(str(path), [])
        world = init_world(config.parallel)
        set_up_process(world.device)
        assert Trainer(config, world).run() == 0


class ForkedTorchrun:
    """chaos.Torchrun, whose agent forks its ranks: torch's own agent, but a restart takes no imports."""

    LONGEST_START_S = 0.6

    def __init__(self, config: Path, log: Path, max_restarts: int):
        start_server()
        self._process = CONTEXT.Process(target=_agent, args=(config, log, max_restarts))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("the agent", timeout)
        return self.poll()

    @staticmethod
    def rank_of(pid: int) -> int | None:
        try:
            word, _, rank = Path(f"/proc/{pid}/comm").read_text().partition("-")
        except OSError:
            return None
        return int(rank) if word == "rank" else None


def _agent(config: Path, log: Path, max_restarts: int) -> None:
    os.setsid()
    with log.open("w") as out:
        for number in (1, 2):
            os.dup2(out.fileno(), number)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    options = api.LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="chaos", rdzv_backend="c10d",
                               rdzv_endpoint="localhost:0", max_restarts=max_restarts, start_method="fork")
    api.elastic_launch(options, _rank)(str(config))


def _rank(config: str) -> None:
    Path("/proc/self/comm").write_text(f"rank-{os.environ['RANK']}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "_exit", sys.exit)  # the agent waits for this function to return
        try:
            sys.exit(cli.main(["train", config]))
        except SystemExit as end:
            if end.code:
                raise
