"""What a training process sets of its machine (gptdist/parallel/host.py)."""

import subprocess
import sys

import pytest
import torch

from gptdist.parallel import host
from tests.conftest import ROOT


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Four hardware threads, two of each core; their quota is in the file that is returned."""
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    monkeypatch.setattr(host, "CPUS", tmp_path)
    monkeypatch.setattr(host, "CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    return tmp_path / "cpu.max"


def test_threads_of_one_core_count_once(machine):
    assert host.physical_cores() == 2


def test_without_a_topology_each_thread_is_a_core(machine, monkeypatch):
    monkeypatch.setattr(host, "CPUS", machine)
    assert host.physical_cores() == 4


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 2), ("100000 100000", 1), ("20000 100000", 1), ("?", 2)])
def test_a_quota_bounds_them(machine, quota, cores):
    machine.write_text(quota)
    assert host.physical_cores() == cores


@pytest.mark.parametrize("flushing", [False, True])
def test_asking_for_denormals_changes_nothing(flushing):
    torch.set_flush_denormal(flushing)
    host.can_flush_denormals()
    assert ((torch.full((1,), 2.0**-130) * 1.0).item() == 0.0) == (flushing and host.can_flush_denormals())


def test_freed_memory_is_kept():
    """In a process of its own: a buffer that is taken and freed again and again comes to meet no new page.

    Not at once: glibc before 2.38 passes over a hole that has the size but not the room to align it.
    """
    program = """
import resource, torch
from gptdist.parallel.host import keep_freed_memory
if not keep_freed_memory():
    print("another C library")
    raise SystemExit
def touch():
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    first = touch()
for _ in range(10):
    last = touch()
print(last - first)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    if "another" in said:
        pytest.skip("the C library is not glibc")
    assert int(said) < 1000  # of 163,840 pages


def test_fp32_products_stay_fp32():
    if not host.use_onednn_for_fp32():
        pytest.skip("oneDNN is absent, or would compute in bf16 on this processor")
    x, w = torch.randn(64, 768), torch.randn(1024, 768)
    error = (x @ w.t() - (x.double() @ w.t().double())).abs().max()
    assert error < 1e-3  # bf16: about 0.5


def test_products_that_would_not_stay_with_mkl(monkeypatch):
    before = torch.backends.mkldnn.matmul.fp32_precision
    monkeypatch.setattr(host, "_products_keep_fp32", lambda: False)
    assert not host.use_onednn_for_fp32()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_bf16_products_are_seen():
    assert host._products_keep_fp32()
    with torch.autocast("cpu", torch.bfloat16):
        assert not host._products_keep_fp32()
