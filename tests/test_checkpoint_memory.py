"""Saving and loading need a few blocks of memory beside the state, whatever its size: measured as peak RSS.

Of saves in the foreground: one in the background has its staging copy, by design one more copy of the rank's share.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from gptdist import checkpoint
from tests.conftest import ROOT
from tests.test_checkpoint_ranks import run_world

MB = 1_000_000
LIMIT_MB = 64  # per rank, above the resident state; a second copy of any shard below is larger


def status_mb(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / MB


def peak_mb(do):
    """Peak RSS during `do()` above the RSS before it."""
    before = status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    do()
    return status_mb("VmHWM") - before


def state(shard_mb, world, turned=False):
    """`shard_mb` on each rank: DTensors divided over rows or columns (`turned`: the other way), one not contiguous."""
    mesh = init_device_mesh("cpu", (world,))
    rows = shard_mb * MB // 5 // 4 // 1000 // 4 * 4
    tensors = {"step": torch.zeros(())}
    for i in range(5):
        shape = (rows, 1000 * world) if i == 0 else (rows * world, 1000)
        dim = 1 if (i == 0) != turned else 0
        local = [n // world if d == dim else n for d, n in enumerate(shape)]
        value = torch.full(local[::-1], float(i)).t() if i == 1 else torch.full(local, float(i))
        tensors[f"model.{i}"] = DTensor.from_local(value, mesh, [Shard(dim)])
    return tensors


def measure(root, rank, world):
    shard_mb = int(root.name)
    small = {"x": torch.zeros(1000)}
    checkpoint.load(checkpoint.save(root / f"warm{world}", 1, small), small)  # lazy imports, connections, thread stacks
    tensors = state(shard_mb, world)
    dist.barrier()
    saving = peak_mb(lambda: checkpoint.save(root / f"world{world}", 1, tensors))
    copying = peak_mb(lambda: [tensor.to_local().clone() for tensor in list(tensors.values())[1:]])
    path = root / f"world{world}" / "step-00000001"
    with torch.no_grad():
        tensors["model.2"].to_local().zero_()
    loading = peak_mb(lambda: checkpoint.load(path, tensors))
    check(tensors)
    del tensors
    tensors = state(shard_mb, world, turned=True)
    with torch.no_grad():
        for tensor in list(tensors.values())[1:]:
            tensor.to_local().zero_()
    turning = peak_mb(lambda: checkpoint.load(path, tensors))
    check(tensors)
    (root / f"peak-{world}-{rank}").write_text(f"{saving} {loading} {turning} {copying}")


def check(tensors):
    for i in range(5):
        low, high = tensors[f"model.{i}"].to_local().aminmax()
        assert low == high == i


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak RSS cannot be reset here")
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("shard_mb", [128, pytest.param(1024, marks=pytest.mark.long)])
def test_saving_and_loading_hold_no_second_copy(tmp_path, world, shard_mb):
    root = tmp_path / str(shard_mb // world if shard_mb > 500 else shard_mb)
    root.mkdir()
    command = [sys.executable, "-m", "tests.test_checkpoint_memory", str(root), str(world)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(world):
        saving, loading, turning, copying = map(float, (root / f"peak-{world}-{rank}").read_text().split())
        print(f"{root.name} MB a rank, rank {rank} of {world}: saving +{saving:.0f} MB, loading +{loading:.0f} MB, "
              f"loading as other shards +{turning:.0f} MB (a copy: +{copying:.0f} MB)")
        assert copying > 0.9 * int(root.name), "the instrument sees a second copy"
        assert max(saving, loading, turning) < LIMIT_MB


if __name__ == "__main__":
    run_world(measure, Path(sys.argv[1]), int(sys.argv[2]))
