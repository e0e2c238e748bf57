"""Which implementation of an op runs: `cuda`, `cpu` (C++), or `reference` (pure PyTorch), and why.

The choice is made per call from the tensor's device, dtype and shape; nothing is loaded at import.
`GPTDIST_OPS=reference` forces the reference everywhere. A library that is missing or does not load is a reason, never
an error.
"""

import functools
import os
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import UserError

OPS = (
    "attention",
    "decode_attention",
    "layer_norm",
    "residual_layer_norm",
    "bias_gelu",
    "few_rows_linear",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_logsumexp",
    "dropout",
    "rope",
    "grad_norm",
    "adamw_",
)
PACKAGE = Path(__file__).resolve().parent.parent
LIBRARY = PACKAGE / "_C.so"
CUDA_LIBRARY = PACKAGE / "_C_cuda.so"
BUILD_ERROR = PACKAGE / "_build_error.txt"  # written by setup.py: for each library whose build failed a line, why

# Widths that the CUDA kernels take (csrc/cuda/kernels.h), and the alignment in bytes that they want of every tensor.
WIDTH_STEP, MIN_WIDTH, MAX_WIDTH = 8, 64, 16384
ALIGNMENT = 16
MAX_FEW_ROWS = 8  # of few_rows_linear (csrc/cpu/few_rows_linear.h)
OLDEST_GPU = (8, 0)  # compute capability; setup.py compiles for it and newer ones


class Kernel(NamedTuple):
    """What a compiled op takes: `dtypes`, and `limits` of its shapes in words."""

    dtypes: tuple[torch.dtype, ...]
    limits: str = ""

    def __str__(self):
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        return dtypes + (f"; {self.limits}" if self.limits else "")


_HALVES = (torch.float32, torch.bfloat16, torch.float16)
_CPU = Kernel((torch.float32, torch.bfloat16))
_NORM = Kernel(_HALVES, f"width {MIN_WIDTH} to {MAX_WIDTH} in multiples of {WIDTH_STEP}")
_ADAMW = Kernel((torch.float32,), "gradients in float32, bfloat16 or float16")
_CPU_HEADS = Kernel(_CPU.dtypes, "head dimension in multiples of 16 up to 256")
COMPILED = {
    "cpu": {
        "attention": _CPU_HEADS,
        "decode_attention": _CPU_HEADS,
        "layer_norm": _CPU,
        "residual_layer_norm": _CPU,
        "bias_gelu": _CPU,
        "few_rows_linear": Kernel(_CPU.dtypes, f"up to {MAX_FEW_ROWS} rows"),
        "cross_entropy": _CPU,
        "linear_cross_entropy": _CPU,
        "dropout": _CPU,
        "adamw_": _ADAMW,
        "grad_norm": Kernel(_HALVES),
    },
    "cuda": {
        "attention": Kernel(_HALVES[1:], "head dimension 64 or 128"),
        "decode_attention": Kernel(_HALVES[1:], "head dimension 64 or 128, pages of a power of two"),
        "layer_norm": _NORM,
        "residual_layer_norm": _NORM,
        "bias_gelu": Kernel(_HALVES, f"width in multiples of {WIDTH_STEP}"),
        "cross_entropy": Kernel(_HALVES),
        "linear_cross_entropy": Kernel(_HALVES),
        "dropout": Kernel(_HALVES),
        "adamw_": _ADAMW,
        "grad_norm": Kernel(_HALVES),
    },
}


class Choice(NamedTuple):
    """`backend` that runs, and `reason` for it in words."""

    backend: str
    reason: str


def forced_reference() -> bool:
    """True if GPTDIST_OPS=reference; raises UserError for a value that means nothing."""
    value = os.environ.get("GPTDIST_OPS", "")
    if value not in ("", "auto", "reference"):
        raise UserError(f"GPTDIST_OPS={value!r} is unknown: use 'reference' or 'auto'")
    return value == "reference"


def _load(library: Path) -> str:
    """Load a library; the empty string, or why it is not there."""
    if not library.exists():
        notes = BUILD_ERROR.read_text().splitlines() if BUILD_ERROR.exists() else []
        for name, _, cause in (line.partition(": ") for line in notes):
            if name == library.stem:
                return f"not built: {cause}"
        return f"not built: {library} is missing (pip install --no-build-isolation -e . builds it)"
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"{library} does not load: {str(error).splitlines()[0]}"
    return ""


@functools.cache
def library_problem() -> str:
    """Load the C++ library once; the empty string, or why it is not there."""
    return _load(LIBRARY)


@functools.cache
def cuda_library_problem() -> str:
    """Load the CUDA library once, which needs the C++ one for its schemas. It loads on machines without a GPU too."""
    return library_problem() or _load(CUDA_LIBRARY)


def cuda_device_problem() -> str:
    """Why torch sees no CUDA device, or the empty string."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    return ""


@functools.cache
def cuda_problem(index: int) -> str:
    """Why the CUDA kernels do not run on device `index`, or the empty string."""
    problem = cuda_device_problem() or cuda_library_problem()
    if problem:
        return problem
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_GPU:
        return "GPU {} has compute capability {}.{}, the kernels need {}.{}".format(index, *capability, *OLDEST_GPU)
    runtime, driver = cuda_versions()
    if driver // 1000 >= runtime // 1000:
        return ""
    return f"the driver is for CUDA {version(driver)}, {CUDA_LIBRARY.name} was built with CUDA {version(runtime)}"


def cuda_versions() -> tuple[int, int]:
    """Of the runtime in the loaded CUDA library and of the driver: 1000 major + 10 minor, 0 for none."""
    return torch.ops.gptdist_c.cuda_versions()


def version(number: int) -> str:
    """13000 -> '13.0'."""
    return f"{number // 1000}.{number % 1000 // 10}"


def choose(
    op: str, device: torch.device | str, dtype: torch.dtype | None = None, misfit: str = "", cpu_misfit: str = ""
) -> Choice:
    """The backend that `op` runs on for a device and, where given, a dtype.

    misfit, cpu_misfit: why a tensor's shape does not suit the CUDA or the CPU kernel, or the empty string (see
    width_misfit).
    """
    if forced_reference():
        return _FORCED
    device = torch.device(device) if isinstance(device, str) else device
    backend = "cuda" if _test_device else device.type
    return _choice(op, backend, dtype, (misfit if backend == "cuda" else cpu_misfit) or _problem(device))


_FORCED = Choice("reference", "forced by GPTDIST_OPS=reference")


@functools.cache
def _choice(op: str, backend: str, dtype: torch.dtype | None, problem: str) -> Choice:
    kernel = COMPILED.get(backend, {}).get(op)
    if kernel is None:
        return Choice("reference", f"no {backend} kernel for this op")
    if dtype is not None and dtype not in kernel.dtypes:
        return Choice("reference", f"the {backend} kernel does not take {dtype}")
    return Choice("reference", problem) if problem else Choice(backend, f"takes {kernel}")


def _problem(device: torch.device) -> str:
    """Why the library that a device's kernels are in cannot be used, or the empty string."""
    if _test_device:
        return ""
    if device.type != "cuda":
        return library_problem()
    if device.index is None:
        return cuda_device_problem() or cuda_problem(torch.cuda.current_device())
    return cuda_problem(device.index)


def width_misfit(width: int, least: int = WIDTH_STEP, most: int = (1 << 31) - 1) -> str:
    """Why the CUDA kernels do not take rows of `width` elements, or the empty string."""
    if least <= width <= most and width % WIDTH_STEP == 0:
        return ""
    return f"width {width} is no multiple of {WIDTH_STEP} from {least} to {most}"


def norm_misfit(width: int) -> str:
    return width_misfit(width, MIN_WIDTH, MAX_WIDTH)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x as the CUDA kernels want it, contiguous and from a multiple of ALIGNMENT bytes: itself or a copy."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., D), or a contiguous copy where a row of D is not contiguous or begins at no multiple of ALIGNMENT."""
    step = ALIGNMENT // x.element_size()
    in_steps = all(n == 1 or stride % step == 0 for n, stride in zip(x.shape[:-1], x.stride(), strict=False))
    return x if in_steps and x.stride(-1) == 1 and x.data_ptr() % ALIGNMENT == 0 else aligned(x)


def cuda_parameter(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight or bias as the CUDA kernels take it beside tensors of `dtype`: in `dtype` or fp32."""
    return aligned(x if x.dtype == dtype else x.float())


# The CUDA kernels on CPU tensors, for tests.

_test_device = False


@contextmanager
def test_device():
    """Inside, ops on CPU tensors run as on a CUDA device, by the kernels of the loaded library gptdist/_vm.so.

    What the tests run a whole model with (tests/cuda_vm.py). Not for threads.
    """
    global _test_device
    _test_device = True
    try:
        yield
    finally:
        _test_device = False


def cuda_kernels():
    """The namespace of the compiled ops that a choice of `cuda` means."""
    return torch.ops.gptdist_vm if _test_device else torch.ops.gptdist_c


def kernels(backend: str):
    """The namespace of the compiled ops that a choice of `cuda` or `cpu` means."""
    return cuda_kernels() if backend == "cuda" else torch.ops.gptdist_c


def on_cuda(device: torch.device) -> bool:
    """Whether a device is a CUDA device or stands for one in a test."""
    return device.type == "cuda" or _test_device


def custom_op(name: str, mutates_args: tuple[str, ...] = ()):
    """torch.library.custom_op for an op whose first argument is a tensor or a list of them, functional unless it says
    what it mutates. It becomes an Op, which is called by positions, with all arguments.

    Autocast is off inside the implementation: torch leaves it on below a custom op, where it would turn the fp32
    matrix products of a reference into bf16 ones.
    """

    def decorate(function):
        @functools.wraps(function)
        def without_autocast(first, *args, **kwargs):
            device_type = (first if isinstance(first, torch.Tensor) else first[0]).device.type
            if not torch.is_autocast_enabled(device_type):
                return function(first, *args, **kwargs)
            with torch.autocast(device_type, enabled=False):
                return function(first, *args, **kwargs)

        return Op(without_autocast, torch.library.custom_op(name, mutates_args=mutates_args)(without_autocast))

    return decorate


class Op:
    """An op of torch.library that eager calls on plain tensors reach without its dispatch.

    torch.library's Python costs about 0.1 ms for a call and its gradient, a hundred times a step of GPT-2 124M, and its
    first call more than a second, in which it imports torch.compile. What needs it has it: torch.compile and export,
    dispatch modes, functorch's transforms, subclasses of Tensor.
    """

    def __init__(self, run, library_op):
        self.run, self._library_op, self._function = run, library_op, None
        self.register_fake = library_op.register_fake

    def register_autograd(self, backward, *, setup_context):
        self._library_op.register_autograd(backward, setup_context=setup_context)

        def forward(ctx, *args):  # with setup_context as a member, `apply` would bind arguments by their signature
            output = self.run(*args)
            setup_context(ctx, args, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self.run.__name__, (torch.autograd.Function,), members)

    def __call__(self, *args):
        if observed(args):
            return self._library_op(*args)
        if not torch.is_grad_enabled():
            return self.run(*args)
        # Without a gradient of its own the library's op raises where one is asked for.
        return self._library_op(*args) if self._function is None else self._function.apply(*args)


def observed(args) -> bool:
    """Whether anything but autograd wants to see a call with these arguments."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(type(x) not in PLAIN_TENSORS and isinstance(x, torch.Tensor) for x in args)


PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a reference op computes in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
