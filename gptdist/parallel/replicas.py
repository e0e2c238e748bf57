"""What several ranks hold alike, compared: a difference is a processor or memory that computed or kept a wrong value.

Each rank sums the bits of each tensor as integers, modulo 2^64: any one altered element changes the sum. One reduction
of those sums tells whether all are equal; only if they are not are they gathered.
"""

import socket
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gptdist.errors import ReplicaError
from gptdist.parallel.meeting import exchange
from gptdist.parallel.strategies import Strategy

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def check_replicas(strategy: Strategy, step: int) -> None:
    """Raise ReplicaError, the same on every rank, where ranks differ in what they hold alike; a collective call.

    It names the ranks, their hosts and the first tensor that differs.
    """
    found = [difference for group, tensors in strategy.replicas()
             if (difference := _difference(strategy, group, tensors)) is not None]
    if not strategy.world.sum(torch.tensor(len(found))).item():
        return
    everywhere = exchange(found[0] if found else None)
    raise ReplicaError(f"after step {step} {next(filter(None, everywhere))}: a processor or memory may be faulty; "
                       f"leave that host out and start again, to go on from the last checkpoint", agreed=True)


def bit_sums(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """int64 (len(tensors),)."""
    return torch.stack([tensor.contiguous().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64).to(device)
                        for tensor in tensors])


def _difference(strategy: Strategy, group: dist.ProcessGroup | None, tensors: Mapping[str, Tensor]) -> str | None:
    sums = bit_sums(list(tensors.values()), strategy.world.device)
    bounds = torch.stack([sums, ~sums])  # the largest of ~x is that of the smallest x
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group)
    if torch.equal(bounds[0], ~bounds[1]):
        return None
    return describe(list(tensors), exchange((dist.get_rank(), socket.gethostname(), sums.tolist()), group))


def describe(keys: Sequence[str], everyone: Sequence[tuple[int, str, list[int]]]) -> str:
    """everyone: (rank, host, sum of each key) of each rank."""
    differ = [i for i in range(len(keys)) if len({sums[i] for _, _, sums in everyone}) > 1]
    common, count = Counter(sums[differ[0]] for _, _, sums in everyone).most_common(1)[0]
    odd = [f"rank {rank} (host {host})" for rank, host, sums in everyone if sums[differ[0]] != common]
    if count * 2 <= len(everyone):  # no majority: any may be the wrong one
        odd = [f"rank {rank} (host {host})" for rank, host, _ in everyone]
        told = f"{', '.join(odd[:8])} do not agree"
    else:
        told = f"{', '.join(odd[:8])} {'differs' if len(odd) == 1 else 'differ'} from the other ranks"
    return f"{told} in {keys[differ[0]]} ({len(differ)} of {len(keys)} tensors are not the same)"
