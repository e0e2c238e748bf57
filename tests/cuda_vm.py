"""A CUDA device for tests: the shipped CUDA ops on CPU tensors, their kernels' PTX run by gptdist._ptxvm.

    device = cuda_vm.device()  # skips where something is missing, and says what
    with device.run(seed=1) as log:
        torch.ops.gptdist_vm.dropout(...)  # or gptdist.ops.dropout(...), which runs as on a CUDA device here
    log.launches[0].counters

gptdist/_vm.so has the tensor code, the launchers and the host side of the kernels; a launch comes here as a callback.
The PTX is taken out of gptdist/_C_cuda.so, which is made of the same objects. The machine is told what memory the op
may touch: its tensors, no byte more.
"""

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from benchmarks import ptx
from gptdist.ops import backends

VM_LIBRARY = backends.PACKAGE / "_vm.so"
CACHE = backends.PACKAGE.parent / "build" / "ptx"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of kernels.h's Dtype


class _Region(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("writable", ctypes.c_int32),
        ("label", ctypes.c_char_p),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("variant", ctypes.c_int32),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
    )


_Launch = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
)


@dataclass(frozen=True)
class Plan:
    """What launch_plan.h says of a launch. `kernel` is the name of a template."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int


@dataclass(frozen=True)
class Launch:
    """One launch. `name` is mangled; `params` are the bytes of the kernel's argument; `counters` the machine's."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    params: bytes
    counters: dict

    def follows(self, plan: Plan) -> bool:
        """Whether this is the launch that `plan` describes."""
        mangled = f"{len(plan.kernel)}{plan.kernel}"  # as part of a mangled name
        return mangled in self.name and (plan.grid, plan.block, plan.shared_bytes) == (
            self.grid,
            self.block,
            self.shared_bytes,
        )


@dataclass
class Log:
    launches: list[Launch] = field(default_factory=list)
    failure: BaseException | None = None


class Device:
    """The library gptdist/_vm.so and the PTX of its kernels."""

    def __init__(self, ptx: list[str]):
        from gptdist import _ptxvm

        self.ptx = ptx  # one text for each source of csrc/cuda
        self._new_module = functools.cache(_ptxvm.Module)
        torch.ops.load_library(str(VM_LIBRARY))
        self._library = ctypes.CDLL(str(VM_LIBRARY))
        self._library.gptdist_vm_regions.restype = ctypes.c_int64
        self._callback = _Launch(self._launch)  # kept alive here
        self._library.gptdist_vm_set_launch(self._callback)
        self._run: tuple[Log, object, dict] | None = None

    def ptx_of(self, kernel: str) -> str:
        """The text that defines a kernel whose mangled name contains `kernel`."""
        return next(text for text in self.ptx if any(kernel in name for name in self._new_module(text).kernels))

    def plan(self, launcher: str, dtype: torch.dtype, rows: int, width: int, batch: int = 1) -> Plan:
        """launch_plan.h's answer for `launcher` of kernels.h."""
        plan = _Plan()
        sizes = ctypes.c_int64(batch), ctypes.c_int64(rows), ctypes.c_int32(width)
        number = ctypes.c_int32(DTYPES.index(dtype))
        if self._library.gptdist_vm_plan(launcher.encode(), number, *sizes, ctypes.byref(plan)):
            raise KeyError(launcher)
        return Plan(plan.kernel.decode(), tuple(plan.grid), tuple(plan.block), plan.shared_bytes)

    @contextmanager
    def run(self, *, module=None, **options) -> Iterator[Log]:
        """Inside, CUDA ops run here, gptdist.ops included.

        module: a _ptxvm.Module whose kernels replace the shipped ones of the same names (a mutant). options: of
        _ptxvm.Module.launch (seed, races, poison, ...); blocks may be a function of the kernel's name and its number of
        blocks. What the machine raises is raised as itself.
        """
        log = Log()
        self._run = (log, module, options)
        try:
            with backends.test_device():
                yield log
        except Exception:
            if log.failure is None:
                raise
        finally:
            self._run = None
        if log.failure is not None:
            raise log.failure

    def _launch(self, name, grid, block, shared_bytes, arguments) -> int:
        """The callback: 0, or 1 if the launch failed; exceptions do not pass through C."""
        if self._run is None:
            return 1
        log, replacement, options = self._run
        try:
            sizes = tuple(grid[:3]), tuple(block[:3]), shared_bytes
            log.launches.append(self._execute(name.decode(), *sizes, arguments[0], replacement, options))
        except BaseException as failure:
            log.failure = failure
            return 1
        return 0

    def _execute(self, name, grid, block, shared_bytes, argument, replacement, options) -> Launch:
        module = self._module(name, replacement)
        if callable(options.get("blocks")):
            options = options | {"blocks": options["blocks"](name, grid[0])}
        params = ctypes.string_at(argument, module.kernel(name).param_bytes)
        counters = module.launch(
            name,
            grid=grid,
            block=block,
            params=params,
            shared_bytes=shared_bytes,
            buffers=self._buffers(),
            **options,
        )
        return Launch(name, grid, block, shared_bytes, params, counters)

    def _module(self, name, replacement):
        modules = ([] if replacement is None else [replacement]) + [self._new_module(text) for text in self.ptx]
        for module in modules:
            if name in module.kernels:
                return module
        raise KeyError(f"no PTX in {backends.CUDA_LIBRARY.name} defines the kernel {name}")

    def _buffers(self) -> list[tuple[int, int, bool, str]]:
        regions = ctypes.POINTER(_Region)()
        count = self._library.gptdist_vm_regions(ctypes.byref(regions))
        return [(r.address, r.bytes, bool(r.writable), r.label.decode()) for r in regions[:count]]


def cuobjdump() -> str | None:
    """NVIDIA's tool that takes PTX out of a library, or None."""
    return ptx.tool("cuobjdump")


def extracted_ptx(library: Path) -> list[str]:
    """The PTX texts in a library, from a cache that is keyed by its contents."""
    folder = CACHE / hashlib.sha256(library.read_bytes()).hexdigest()[:16]
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=CACHE))
        command = [cuobjdump(), "--extract-ptx", "all", str(library)]
        subprocess.run(command, cwd=work, check=True, capture_output=True, timeout=120)
        try:
            work.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(work)
    return [path.read_text() for path in sorted(folder.glob("*.ptx"))]


def missing() -> str:
    """Why there is no test device, or the empty string."""
    problem = backends.cuda_library_problem()
    if problem:
        return problem
    if not VM_LIBRARY.exists() or not (backends.PACKAGE / "_ptxvm.so").exists():
        return "gptdist/_vm.so and _ptxvm.so are not built (GPTDIST_PTXVM=1, as bash launch/test.sh sets, builds them)"
    if cuobjdump() is None:
        return "no cuobjdump (pip install nvidia-cuda-cuobjdump)"
    return ""


@functools.cache
def _device() -> Device:
    return Device(extracted_ptx(backends.CUDA_LIBRARY))


def device() -> Device:
    """The device; skips the test where it is missing."""
    problem = missing()
    if problem:
        pytest.skip(problem)
    return _device()


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Memory that an op allocates holds NaN: an element that a kernel leaves out does not keep an earlier result."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
