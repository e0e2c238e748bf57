"""Where the time of each rank's steps goes, and which rank the others wait for.

All ranks of a step end it together, so a step takes as long everywhere. What tells them apart is `own_s`: its time less
that spent waiting for other ranks.

    step_s       from the end of the step before to the end of this one
    data_wait_s  of it, waiting for the next batch
    sync_wait_s  of it, in the first collective: for whoever comes last from data, evaluation or a save
    own_s        step_s - sync_wait_s; on a CPU also without the time between there and the step's end in which this
                 thread neither computed nor waited for a core, so was waiting for other ranks' tensors. A GPU's waits
                 inside its collectives are not told from computing (profile.steps shows them)
"""

import contextlib
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gptdist.parallel.meeting import exchange
from gptdist.parallel.world import World

FIELDS = ("step_s", "data_wait_s", "sync_wait_s", "own_s")
SCHEDSTAT = Path("/proc/thread-self/schedstat")  # ns on a core, ns waiting for one, times


class RankTimes:
    """Sums over the steps since the last row. All of it is nothing in a run of one process."""

    def __init__(self, world: World):
        self._on = world.size > 1
        self._on_cpu = world.device.type == "cpu"
        self._hosts = exchange(socket.gethostname()) if self._on else []
        self._sums, self._steps = torch.zeros(len(FIELDS), dtype=torch.float64), 0
        self._ended, self._waited, self._sync = time.perf_counter(), 0.0, 0.0
        self._computing = 0.0, 0.0

    def pause(self) -> None:
        """What comes next is no part of a step (evaluation, saving)."""
        self._ended = time.perf_counter()

    @contextlib.contextmanager
    def synchronising(self) -> Iterator[None]:
        """Around the first collective of a step."""
        began = time.perf_counter()
        yield
        ended = time.perf_counter()
        self._sync, self._computing = ended - began, (ended, _busy_s())

    def end_step(self, data_waited_s: float) -> None:
        """data_waited_s: for all batches of the run so far."""
        now, (began, busy) = time.perf_counter(), self._computing
        idle = max(0.0, (now - began) - (_busy_s() - busy)) if self._on_cpu else 0.0
        step_s = now - self._ended
        self._sums += torch.tensor([step_s, data_waited_s - self._waited, self._sync, step_s - self._sync - idle])
        self._steps, self._ended, self._waited = self._steps + 1, now, data_waited_s

    def row(self) -> dict[str, Any]:
        """Means per step since the last row, over the ranks, for metrics.jsonl; a collective call, one all-gather.

        Of each of FIELDS its min, median and max; the rank whose own_s is the largest; empty for one process.
        """
        if not self._on or self._steps == 0:
            return {}
        means = [torch.zeros_like(self._sums) for _ in self._hosts]
        dist.all_gather(means, self._sums / self._steps)
        columns = dict(zip(FIELDS, torch.stack(means).T.tolist(), strict=True))
        row: dict[str, Any] = {"steps": self._steps}
        for name, values in columns.items():
            row |= {f"{name}_min": min(values), f"{name}_median": statistics.median(values), f"{name}_max": max(values)}
        slowest = columns["own_s"].index(row["own_s_max"])
        self._sums.zero_()
        self._steps = 0
        return row | {"slowest_rank": slowest, "slowest_host": self._hosts[slowest],
                      "own_s_of_ranks": [round(value, 6) for value in columns["own_s"]]}


def _busy_s() -> float:
    """Seconds in which this thread had a core, or waited for one."""
    try:
        return sum(map(int, SCHEDSTAT.read_text().split()[:2])) / 1e9
    except OSError:
        return time.thread_time()
