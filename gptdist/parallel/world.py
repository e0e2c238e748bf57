"""The processes of a run: rank, device, process group, device mesh, and how a process ends."""

import functools
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gptdist.config import ParallelConfig
from gptdist.errors import LostError, MissingError, UserError
from gptdist.parallel.host import physical_cores
from gptdist.parallel.meeting import open_store

MESH_DIMS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def env_rank() -> int:
    """This process's rank as the launcher tells it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def env_world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def env_local_world_size() -> int:
    """Processes on this node: torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


@dataclass(frozen=True)
class World:
    """One process's view of the run. `mesh` is None for a single process without a process group."""

    rank: int
    size: int
    device: torch.device
    strategy: str
    mesh: DeviceMesh | None
    tensor: int = 1  # consecutive ranks that divide each layer and work on the same batches

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """Which share of every batch is this rank's."""
        return self.rank // self.tensor

    @property
    def dp_size(self) -> int:
        return self.size // self.tensor

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the data-parallel ranks, returned on the CPU; integers stay exact.

        Tensor-parallel ranks have the same values, which count once. An integer that only some of them have, such as
        a signal that one received, is rounded up.
        """
        if self.mesh is None:
            return values.cpu()
        values = values.to(self.device)
        dist.all_reduce(values)
        if values.is_floating_point():
            return (values / self.tensor).cpu()
        return -(-values // self.tensor).cpu()

    def agree(self, tokens: list[int]) -> list[int]:
        """Rank 0's: with tokens of its own, one that rounds otherwise could end a text earlier than the others."""
        if self.mesh is None:
            return tokens
        shared = torch.tensor(tokens, device=self.device)
        dist.broadcast(shared, 0)
        return shared.tolist()

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()


def init_world(config: ParallelConfig) -> World:
    """Read the launcher's environment, choose the device, join the process group, set the CPU threads.

    Raises UserError for a strategy that does not fit the number of processes, MissingError for an absent GPU, LostError
    where not all processes join.
    """
    rank, size = env_rank(), env_world_size()
    local_size = env_local_world_size()
    strategy = config.strategy if config.strategy != "auto" else ("single" if size == 1 else "fsdp")
    if strategy == "single" and size > 1:
        raise UserError(f"parallel.strategy=single runs in one process, but {size} were started: use ddp or fsdp",
                        agreed=True)
    device = choose_device(config.device)
    torch.set_num_threads(config.threads or max(1, physical_cores() // local_size))
    tensor = config.tensor
    if size % tensor:
        raise UserError(f"parallel.tensor={tensor} does not divide the {size} processes that were started",
                        agreed=True)
    if strategy == "single":
        return World(rank, size, device, strategy, None)
    join(device, rank, size, config.timeout_s)
    replicas = _replicas(config, strategy, size, local_size)
    shape = (1, replicas, size // replicas // tensor, 1, tensor)
    return World(rank, size, device, strategy, _mesh(dist.group.WORLD, device.type, shape), tensor)


@functools.cache
def _mesh(world: dist.ProcessGroup, device: str, shape: tuple[int, ...]) -> DeviceMesh:
    """One of a shape for the whole process: gloo has threads for each of its groups, which wake 100 times a second."""
    return init_device_mesh(device, shape, mesh_dim_names=MESH_DIMS)


def _replicas(config: ParallelConfig, strategy: str, size: int, local_size: int) -> int:
    """Copies of the model's shards over the ranks: ddp one per rank, hsdp as configured, the others one."""
    if strategy == "ddp":
        return size
    if strategy != "hsdp":
        return 1
    replicas = config.replicas or size // local_size
    if size % (replicas * config.tensor):
        times = "" if config.tensor == 1 else f" x parallel.tensor={config.tensor}"
        raise UserError(f"parallel.replicas={replicas}{times} does not divide the {size} processes that were started",
                        agreed=True)
    return replicas


def choose_device(wanted: str) -> torch.device:
    """This process's device for parallel.device. Raises MissingError where it is not there."""
    available, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    if wanted == "cuda" and not available:
        raise MissingError("parallel.device=cuda, but torch sees no GPU: "
                           "see `gptdist doctor`, or use --parallel.device=cpu")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise MissingError(f"local rank {local_rank} has no GPU: this host shows {torch.cuda.device_count()}; "
                           f"start as many processes per node as there are GPUs")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def join(device: torch.device, rank: int, size: int, timeout_s: int) -> None:
    """Be one of the default process group, unless this process is already. Raises UserError as open_store does."""
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Without a launcher a world of one needs no address: an in-process store serves.
    store = dist.HashStore() if size == 1 and "MASTER_ADDR" not in os.environ else open_store(rank, size, timeout_s)
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), store=store, rank=rank, world_size=size)
    except RuntimeError as error:
        raise LostError(f"not all of the {size} processes met: one died at its start, or the network does not let them "
                        f"reach each other ({str(error).partition(chr(10))[0]})") from error


def end_process(code: int) -> None:
    """End this process now, with this code, after flushing.

    A normal interpreter exit after FSDP on gloo aborts about half of the time (a gloo thread drops a Python object
    during shutdown), which a launcher takes for a failure. Success waits for all ranks first.
    """
    if code == 0 and dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)
