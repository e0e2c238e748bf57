"""How the processes of a run first meet, and small values that they exchange: JSON, so nothing received is unpickled.

    roll_call   over the launcher's store, before there is a process group: no fault of one rank leaves others waiting
    exchange    between the ranks of the process group
"""

import contextlib
import functools
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gptdist.errors import LostError, UserError

T = TypeVar("T")
_CALLS = itertools.count()  # the keys of one call are not those of the next
HANDSHAKE_S = 15
READ_S = 10  # how long the rank that may serve the store waits for the others to have read the judgement


@functools.cache
def open_store(rank: int, size: int, timeout_s: int) -> dist.Store:
    """The store whose address the launcher gave to every rank, opened once in a process.

    Under torchrun its agent serves it, else rank 0: torch's listens on every address of the host, and this one, where
    MASTER_ADDR is a name of this host for itself, on that alone. Raises UserError where the ranks cannot meet there,
    LostError on other ranks than 0 where nothing answers.
    """
    address, port, timeout = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"), timedelta(seconds=timeout_s)
    if not address or not port:
        raise UserError(f"WORLD_SIZE={size}, but MASTER_ADDR and MASTER_PORT do not say where the processes meet: "
                        f"start them with torchrun or deepspeed, or set both")
    try:
        if rank != 0 and not served_by_agent() and not wait_for_store(address, int(port), timeout_s):
            raise UserError(f"port {port} of {address} (MASTER_ADDR, MASTER_PORT) is taken by another program: give "
                            f"the launcher another port")
        if rank == 0 and not served_by_agent() and is_loopback(address):
            listening = socket.create_server(("127.0.0.1", int(port)))
            return dist.TCPStore(address, int(port), size, True, timeout, wait_for_workers=False,
                                 master_listen_fd=listening.detach())
        return next(dist.rendezvous("env://", timeout=timeout))[0]
    except (dist.DistNetworkError, dist.DistStoreError, OSError, ValueError) as error:
        lost = rank != 0 and isinstance(error, dist.DistError)  # rank 0, which may have died, is not there
        raise (LostError if lost else UserError)(
            f"the processes cannot meet at {address}:{port} (MASTER_ADDR, MASTER_PORT): "
            f"{' '.join(str(error).split())[:200]}: give the launcher a host and a free port that every node "
            f"reaches") from error


def served_by_agent() -> bool:
    """Whether torchrun's agent serves the store, else rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def wait_for_store(host: str, port: int, timeout_s: float) -> bool:
    """Whether a store of torch's answers there, else another program. Raises DistNetworkError where none does."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connect(host, port)
            if is_store(host, port):
                return True
            connect(host, port)  # else it was the store of rank 0, which has died
            return False
        except OSError as error:
            if time.monotonic() > deadline:
                raise dist.DistNetworkError(f"nothing answered within {timeout_s:.0f} s ({error})") from None
        time.sleep(0.2)


def connect(host: str, port: int) -> None:
    """Raises OSError where nobody listens."""
    with socket.create_connection((host, port), timeout=5) as connection:
        if connection.getsockname() == connection.getpeername():
            raise ConnectionRefusedError("nobody listens, so the connection met itself")


def is_store(host: str, port: int) -> bool:
    """Whether a store of torch's answers there. The client waits without end for a program that says nothing."""
    found = []

    def greet() -> None:
        with contextlib.suppress(RuntimeError):  # the answer is another program's
            dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=HANDSHAKE_S))
            found.append(True)

    client = threading.Thread(target=greet, daemon=True)
    with _quiet():  # the client prints C++ frames for every try
        client.start()
        client.join(HANDSHAKE_S + 0.5)
    return bool(found)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that this process writes to stderr appears, C++ included."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def is_loopback(address: str) -> bool:
    return address in ("localhost", "::1") or address.startswith("127.")


def roll_call(facts: Any, judge: Callable[[list[Any]], T], *, rank: int, size: int, timeout_s: int) -> T:
    """What `judge` says, on rank 0, of the facts of all ranks, by rank; a collective call without a process group.

    Facts and judgement are whatever JSON has. Raises LostError if not all ranks come within `timeout_s`.
    """
    if size == 1:
        return judge([facts])
    # A store of rank 0's is of this start alone. torchrun's stays for the next one, so the count of restarts tells them
    # apart; elsewhere it must not: a node that comes back begins with another count than those that stayed.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if served_by_agent() else "0"
    store = dist.PrefixStore(f"gptdist/roll_call/{attempt}.{next(_CALLS)}", open_store(rank, size, timeout_s))
    try:
        if rank != 0:
            store.set(str(rank), json.dumps(facts))
            judgement = json.loads(store.get("judgement"))
            store.add("readers", 1)
            return judgement
        judgement = judge([facts, *(json.loads(store.get(str(other))) for other in range(1, size))])
        store.set("judgement", json.dumps(judgement))
        deadline = time.monotonic() + READ_S
        while store.add("readers", 0) < size - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        return judgement
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise LostError(f"rank {rank} on {socket.gethostname()} waited {timeout_s} s (parallel.timeout_s) at most for "
                        f"all {size} processes to start: see what the others say ({str(error).splitlines()[0]:.150})"
                        ) from error


def exchange(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The value of every rank of a group (None: all), by rank; a collective call, two small all-gathers.

    value: whatever JSON has. Without a process group, this process's alone.
    """
    data = json.dumps(value).encode()
    if not dist.is_initialized():
        return [json.loads(data)]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([len(data)]), group=group)
    padded = torch.frombuffer(bytearray(data.ljust(max(map(int, sizes)))), dtype=torch.uint8)
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded, group=group)
    return [json.loads(bytes(one.numpy())[:int(size)]) for one, size in zip(received, sizes, strict=True)]
