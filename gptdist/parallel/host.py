"""What a process sets of the machine it runs on: CPU threads, denormal numbers, how freed memory is kept."""

import ctypes
import os
import platform
from pathlib import Path

import torch

CPUS = Path("/sys/devices/system/cpu")
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "max 100000", or microseconds of CPU time per period
# mallopt's parameters (malloc.h), and its largest value.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
INT_MAX = (1 << 31) - 1
TOP_PAD_BYTES = 64 << 20


def physical_cores() -> int:
    """Cores that this process may use: hardware threads of one core count once, and a container's quota bounds them."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota()))


def _siblings(cpu: int) -> str:
    """The hardware threads of the core that `cpu` belongs to, as the kernel writes them."""
    try:
        return (CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> int:
    try:
        quota, period = CGROUP_QUOTA.read_text().split()
    except (OSError, ValueError):
        return INT_MAX
    return INT_MAX if quota == "max" else max(1, round(int(quota) / int(period)))


def has_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bf16 with instructions of its own."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported()


def set_up_process(device: torch.device) -> None:
    """Settings of a process that trains on `device`; they stay for its life."""
    # Processors take many times as long for denormals, and optimizer moments of idle weights decay into them.
    torch.set_flush_denormal(True)
    if device.type == "cpu":
        keep_freed_memory()
        use_onednn_for_fp32()


def can_flush_denormals() -> bool:
    """Whether this processor treats denormals as zero when asked to; how the process is set does not change."""
    before = (torch.full((1,), 2.0**-130) * 1.0).item() == 0.0
    can = torch.set_flush_denormal(True)
    torch.set_flush_denormal(before)
    return can


def can_keep_freed_memory() -> bool:
    """Whether the C library is one that keep_freed_memory knows."""
    return platform.libc_ver()[0] == "glibc"


def keep_freed_memory() -> bool:
    """Make glibc keep what is freed for the next allocation; False where the C library is another.

    A training step allocates the same large buffers again and again. By default each is mapped afresh, zeroed by the
    kernel page by page and unmapped: for a plain PyTorch GPT-2 124M in fp32 at 4 x 64 tokens on two cores 730 ms a step
    became 608.
    """
    if not can_keep_freed_memory():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all((mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, INT_MAX), mallopt(M_TOP_PAD, TOP_PAD_BYTES)))


def use_onednn_for_fp32() -> bool:
    """Send fp32 matrix products to oneDNN instead of MKL, if they stay fp32 there; False where they would not.

    MKL keeps its AVX-512 kernels for Intel's processors. torch has no setting for the library, but one that lets
    products be computed in bf16, which oneDNN alone reads and which it follows only on processors with AMX. Afterwards
    torch.get_float32_matmul_precision raises, as it knows no setting of one backend alone.
    """
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    if setting is None or not torch.backends.mkldnn.is_available():
        return False
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    if _products_keep_fp32():
        return True
    setting.fp32_precision = before
    return False


def _products_keep_fp32() -> bool:
    """Whether the three products of a linear layer see the 12th bit of fp32's mantissa, which bf16 has not."""
    x, w, dy = (torch.full(shape, 1 + 2**-12) for shape in ((256, 512), (1024, 512), (256, 1024)))
    return all((a @ b).float().allclose(torch.tensor((1 + 2**-12) ** 2 * a.shape[1]), rtol=2**-16, atol=0)
               for a, b in ((x, w.t()), (dy, w), (dy.t(), x)))
