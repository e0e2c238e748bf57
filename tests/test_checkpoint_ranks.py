"""Several ranks: every world size loads what every other saved; one failing rank fails all; kill -9 leaves no half.

One helper process imports torch once and forks the ranks of each world from itself.
"""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gptdist import checkpoint
from gptdist.checkpoint import files
from gptdist.checkpoint.index import INDEX_NAME, decode
from gptdist.errors import UserError

WORLDS = (1, 2, 3, 4)


# What is saved: key -> (full tensor, placement). Rows of 8, 7, 2 and 1 split evenly, unevenly and into empty shards.
def full_state(world):
    torch.manual_seed(world)
    state = {}
    for rows in (8, 7, 2, 1):
        state[f"model.rows{rows}"] = (torch.randn(rows, 6), Shard(0))
        state[f"optim.rows{rows}.exp_avg"] = (torch.randn(rows, 6).bfloat16(), Shard(0))
    state["model.columns"] = (torch.randn(5, 7), Shard(1))
    state["model.replicated"] = (torch.randn(3, 3), Replicate())
    state["model.long"] = (torch.randn(11), Shard(0))
    for i in range(6):
        state[f"model.plain{i}"] = (torch.randn(40), None)
    state["optim.step"] = (torch.tensor(float(world)), None)
    state["optim.step_replicated"] = (torch.tensor(float(world)), Replicate())
    return state


def sharded(world, mesh, fill=None):
    """The state as this rank holds it; `fill` makes a target to load into, with its placements turned around."""
    tensors = {}
    for key, (full, placement) in full_state(world).items():
        value = full if fill is None else torch.full_like(full, fill)
        if fill is not None and key == "model.columns":
            placement = Shard(0)
        if placement is not None and mesh is not None:
            value = distribute_tensor(value, mesh, [placement], src_data_rank=None)
        tensors[key] = value
    return tensors


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_state(tensors, world):
    for key, (full, _) in full_state(world).items():
        assert torch.equal(whole(tensors[key]), full), f"{key} saved at world size {world}"


def save_and_load(root, rank, world):
    """Save at this world size, then load what the others have saved so far."""
    mesh = init_device_mesh("cpu", (world,))
    path = checkpoint.save(root / f"world{world}", 40, sharded(world, mesh), {"train_state.json": b"{}"})
    checkpoint.verify_together(path)
    for other in WORLDS:
        if (root / f"world{other}").exists():
            target = sharded(other, mesh, fill=-1)
            checkpoint.load(root / f"world{other}" / "step-00000040", target)
            assert_state(target, other)


def load_all_and_more(root, rank, world):
    """Load what every world size saved, then the cases that need just this one."""
    mesh = init_device_mesh("cpu", (world,))
    for other in WORLDS:
        target = sharded(other, mesh, fill=-1)
        checkpoint.load(root / f"world{other}" / "step-00000040", target)
        assert_state(target, other)
    if world == 4:
        two_dimensional_meshes(root)
    else:
        failures(root, mesh, rank, world)


def two_dimensional_meshes(root):
    """HSDP, and FSDP2 over tensor parallelism with rows that divide by neither."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    full = torch.arange(35.0).view(7, 5)
    hsdp = distribute_tensor(full, mesh, [Replicate(), Shard(0)], src_data_rank=None)
    path = checkpoint.save(root / "mesh2d", 1, {"w": hsdp})
    assert torch.equal(checkpoint.load_tensors(path)["w"], full)
    checkpoint.load(path, {"w": (target := torch.zeros_like(full))})
    assert torch.equal(target, full)

    model = tensor_parallel_fsdp()
    expected = {name: whole(p) for name, p in model.named_parameters()}
    path = checkpoint.save(root / "mesh2d", 2, dict(model.named_parameters()))
    loaded = checkpoint.load_tensors(path)
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    checkpoint.load(path, dict(model.named_parameters()))
    for name, p in model.named_parameters():
        assert torch.equal(whole(p), expected[name]), name


def tensor_parallel_fsdp():
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 5))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp_shard"])


def failures(root, mesh, rank, world):
    """Whatever goes wrong on one rank is the same UserError on every rank, and nothing stays behind."""
    root = root / "failures"
    tensors = sharded(world, mesh)
    for bad_rank in range(world):
        with disk_full(rank == bad_rank):
            message = user_error(lambda: checkpoint.save(root, 1, tensors))
        assert "No space left on device" in message, message
        assert f"shard-{bad_rank:05d}" in message, message
        assert_all_equal(message, world)
        dist.barrier()  # the coordinator cleans up
        assert list(root.iterdir()) == []
        dist.barrier()
    path = checkpoint.save(root, 1, tensors)
    assert "already exists" in user_error(lambda: checkpoint.save(root, 1, tensors))

    wanted = {"model.plain0": torch.zeros(41 if rank == world - 1 else 40)}
    message = user_error(lambda: checkpoint.load(path, wanted))
    assert message.startswith("model.plain0: the checkpoint has (40,), this model wants (41,)"), message
    assert_all_equal(message, world)
    assert "model.new" in user_error(lambda: checkpoint.load(path, {"model.new": torch.zeros(1)}))

    dist.barrier()
    if rank == 0:
        data = bytearray((path / "shard-00001.safetensors").read_bytes())
        (path / "shard-00001.safetensors").write_bytes(data[:-1] + b"\xff")
    dist.barrier()
    message = user_error(lambda: checkpoint.verify_together(path))
    assert "shard-00001.safetensors: its checksum is wrong" in message, message
    with pytest.raises(RuntimeError, match="x is not a tensor"):
        checkpoint.save(root, 2, {"x": object() if rank == 1 else torch.zeros(1)})


@contextlib.contextmanager
def disk_full(here):
    def full(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if here:
            patch.setattr(files.os, "write", full)
        yield


def user_error(do):
    with pytest.raises(UserError) as caught:
        do()
    assert "\n" not in str(caught.value), caught.value
    return str(caught.value)


def assert_all_equal(value, world):
    values = [None] * world
    dist.all_gather_object(values, value)
    assert set(values) == {value}


def file_size_limit(root):
    """A real failing write: the kernel refuses to let the file grow."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    message = user_error(lambda: checkpoint.save(root / "limit", 1, {"x": torch.zeros(100_000)}))
    assert "File too large" in message, message
    assert "ulimit" in message, message
    assert list((root / "limit").iterdir()) == []


def save_forever(root):
    for step in range(1, 10_000):
        checkpoint.save(root / "killed", step, {f"p{i}": torch.full((20_000,), float(step)) for i in range(8)})


def fork(do, *args):
    if pid := os.fork():
        return pid
    try:
        do(*args)
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # FSDP2 under gloo can abort in an ordinary exit


def one_rank(do, root, store, rank, world):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    do(root, rank, world)
    dist.barrier()


def run_world(do, root, world):
    store = root / f"store-{do.__name__}-{world}"
    wait_for([fork(one_rank, do, root, store, rank, world) for rank in range(world)])


def wait_for(pids):
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert not any(codes), f"exit codes {codes}"


def kill_while_saving(root, pause_s):
    pid = fork(save_forever, root)
    deadline = time.monotonic() + 30
    while len(list((root / "killed").glob("step-*"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    while not list((root / "killed").glob(".tmp-*")) and time.monotonic() < deadline:
        time.sleep(0.0001)
    time.sleep(pause_s)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def helper(root):
    """Everything that needs processes; the pytest process looks at what this leaves in `root`."""
    for world in (4, 3, 2):
        run_world(save_and_load, root, world)
    run_world(load_all_and_more, root, 4)
    run_world(load_all_and_more, root, 3)
    wait_for([fork(file_size_limit, root)])
    for pause_s in (0, 0.001, 0.003, 0.006, 0.01):
        kill_while_saving(root, pause_s)
        (root / "killed").rename(root / f"killed-{time.monotonic_ns()}")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    checkpoint.save(root / "world1", 40, sharded(1, None), {"train_state.json": b"{}"})
    command = [sys.executable, "-m", "tests.test_checkpoint_ranks", str(root)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.mark.parametrize("world", WORLDS)
def test_one_process_loads_every_world_size(ran, world):
    path = ran / f"world{world}" / "step-00000040"
    checkpoint.verify(path)
    target = sharded(world, None, fill=-1)
    checkpoint.load(path, target)
    assert_state(target, world)
    assert_state(checkpoint.load_tensors(path), world)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_replicated_tensors_are_written_once_and_spread(ran, world):
    path = ran / f"world{world}" / "step-00000040"
    index = decode((path / INDEX_NAME).read_bytes(), path)
    homes = {entry.chunks[0].file for key, entry in index.items() if key.startswith("model.plain")}
    assert all(len(e.chunks) == 1 for key, e in index.items() if "plain" in key or "step" in key or "replicated" in key)
    assert len(homes) > 1
    stored = sum(record.size for name, record in checkpoint.complete(path).files.items() if name.startswith("shard-"))
    state_bytes = sum(full.nbytes for full, _ in full_state(world).values())
    assert state_bytes < stored < state_bytes + world * 6000, "no tensor is stored twice"


def test_kill_leaves_only_complete_checkpoints(ran):
    roots = sorted(ran.glob("killed-*"))
    assert len(roots) == 5
    for root in roots:
        good, bad = checkpoint.scan(root)
        assert len(good) >= 5
        assert bad == []
        for path in good[-3:]:
            checkpoint.verify(path)
            step = float(checkpoint.complete(path).step)
            assert all(t.eq(step).all() for t in checkpoint.load_tensors(path).values())
        checkpoint.clean_stale(root)
        assert all(p.name.startswith("step-") for p in root.iterdir())


if __name__ == "__main__":
    helper(Path(sys.argv[1]))
