"""Clocks and rates between the ranks of the process group: for `gptdist doctor --distributed`."""

import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gptdist.parallel.meeting import exchange

ROUND_TRIPS = 8
REPEATS = 5  # of a collective, after one that is not counted
SIZES_BYTES = {"cpu": (64 << 10, 1 << 20, 16 << 20), "cuda": (64 << 10, 1 << 20, 16 << 20, 256 << 20)}
SLOW_S = 0.25  # no larger size is tried where a collective takes longer
# What of its bytes every link carries: Rabenseifner's bound, as nccl-tests reckons its "bus bandwidth" (its
# doc/PERFORMANCE.md), comparable for any number of ranks n.
BUS_SHARE = {"all_reduce": lambda n: 2 * (n - 1) / n, "all_gather": lambda n: (n - 1) / n}


def now_s() -> float:
    """The host's clock."""
    return time.time()


def clock_offsets() -> list[tuple[float, float]]:
    """(how far a rank's clock is ahead of rank 0's, how wrong that may be) in seconds, by rank; [] but on rank 0.

    A collective call.

    A rank answers a message of rank 0 with its time, which lies between two times of rank 0's; the round trip that
    took least is taken (Cristian, Probabilistic clock synchronization, 1989). No clock has to be right.
    """
    if dist.get_rank() != 0:
        message = torch.zeros(1, dtype=torch.float64)
        for _ in range(ROUND_TRIPS):
            dist.recv(message, src=0)
            dist.send(torch.tensor([now_s()], dtype=torch.float64), dst=0)
        return []
    return [(0.0, 0.0), *(_offset(other) for other in range(1, dist.get_world_size()))]


def _offset(other: int) -> tuple[float, float]:
    best, message = (0.0, float("inf")), torch.zeros(1, dtype=torch.float64)
    for _ in range(ROUND_TRIPS):
        sent, began = now_s(), time.perf_counter()
        dist.send(message, dst=other)
        dist.recv(message, src=other)
        half = (time.perf_counter() - began) / 2
        if half < best[1]:
            best = (message.item() - (sent + half), half)
    return best


@dataclass(frozen=True)
class Rate:
    """How fast a collective is: of `size_bytes`, the whole result of an all-gather; the slowest rank's median."""

    op: str
    size_bytes: int
    seconds: float
    bus_bytes_per_s: float


def rates(device: torch.device) -> list[Rate]:
    """The collectives that training is made of, over all ranks, fp32; a collective call."""
    n, found = dist.get_world_size(), []
    for op, share in BUS_SHARE.items():
        for size in SIZES_BYTES[device.type]:
            part = torch.ones(size // 4 // n, device=device)
            whole = torch.ones(part.numel() * n, device=device)
            seconds = max(exchange(statistics.median(_times(op, whole, part))))
            n_bytes = whole.numel() * 4
            found.append(Rate(op, n_bytes, seconds, share(n) * n_bytes / seconds))
            if seconds > SLOW_S:
                break
    return found


def _times(op: str, whole: Tensor, part: Tensor) -> list[float]:
    times = []
    for _ in range(1 + REPEATS):
        dist.barrier()
        began = time.perf_counter()
        if op == "all_reduce":
            dist.all_reduce(whole, dist.ReduceOp.MAX)  # as many bytes as a sum, and ones stay ones
        else:
            dist.all_gather_into_tensor(whole, part)
        if whole.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times[1:]
