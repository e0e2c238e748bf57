"""The ranks that save or load together. Every rank gets through every step, or every rank gets the same error."""

import socket
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from gptdist.errors import ActionableError, DamagedError, LockedError, MissingError, ReplicaError, UserError
from gptdist.parallel.meeting import exchange

T = TypeVar("T")
Fault = tuple[str, str, str]


class Ranks:
    """A process group; without torch.distributed, this process alone. Rank 0 of the group coordinates.

    Under NCCL the few small objects sent here go through the GPU; a gloo group is faster and may be used in a thread.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.world = dist.get_world_size(group) if self.distributed else 1

    def on_coordinator(self, do: Callable[[], T]) -> T:
        """Run `do` on rank 0; every rank gets its result, or its error."""
        result, error = None, None
        if self.rank == 0:
            result, error = _attempt(do)
        box = [(result, _describe(error))]
        if self.distributed:
            dist.broadcast_object_list(box, group=self.group, group_src=0)
        _raise_first(error, [box[0][1]])
        return box[0][0]

    def on_all(self, do: Callable[[], T]) -> T:
        """Run `do` on every rank; if it fails on any, it fails on all, with the error of the lowest rank."""
        result, error = _attempt(do)
        faults = self.gather(_describe(error))
        if self.distributed:
            faults = [fault and _located(rank, fault, None in faults) for rank, fault in enumerate(faults)]
        _raise_first(error, faults)
        return result

    def gather(self, value: T) -> list[T]:
        """The value of every rank, on every rank: whatever JSON has."""
        return exchange(value, self.group) if self.distributed else [value]


def _attempt(do: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return do(), None
    except BaseException as e:  # the other ranks wait for this one: they must hear of a KeyboardInterrupt too
        return None, e


_ACTIONABLE = {kind.__name__: kind for kind in (UserError, DamagedError, LockedError, MissingError, ReplicaError)}


def _describe(error: BaseException | None) -> Fault | None:
    """(kind, text, host), which travels between ranks where an exception might not; the kind is "" for a bug."""
    if error is None:
        return None
    kind, host = type(error).__name__, socket.gethostname()
    if _ACTIONABLE.get(kind) is type(error):
        return kind, str(error), host
    if isinstance(error, UserError):
        return UserError.__name__, str(error), host
    return "", "".join(traceback.format_exception(error)), host


def _located(rank: int, fault: Fault, only_some: bool) -> Fault:
    """The fault, with the rank and its host where not all ranks have one."""
    kind, text, host = fault
    return kind, f"{text} (rank {rank} on {host})" if kind and only_some else text, host


def _raise_first(own: BaseException | None, faults: list[Fault | None]) -> None:
    if own is not None and not isinstance(own, ActionableError):
        raise own
    for rank, fault in enumerate(faults):
        if fault is not None:
            kind, text, _ = fault
            if not kind:
                raise RuntimeError(f"rank {rank} failed:\n{text}") from own
            raise _ACTIONABLE[kind](text, agreed=True) from own
