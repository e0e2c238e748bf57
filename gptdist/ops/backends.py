"""Which implementation of an op runs: `cuda`, `cpu` (C++), or `reference` (pure PyTorch), and why.

The choice is made per call from the tensor's device and dtype; nothing is loaded at import. `GPTDIST_OPS=reference`
forces the reference everywhere. A library that is missing or does not load is a reason, never an error.
"""

import functools
import os
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
    "cross_entropy",
    "linear_cross_entropy",
    "linear_logsumexp",
    "dropout",
    "rope",
    "grad_norm",
)
PACKAGE = Path(__file__).resolve().parent.parent
LIBRARY = PACKAGE / "_C.so"
BUILD_ERROR = PACKAGE / "_build_error.txt"  # written by setup.py: one line, why the last build failed

# Which compiled ops exist, and the dtypes each takes.
COMPILED = {
    "cpu": {"bias_gelu": (torch.float32, torch.bfloat16)},
    "cuda": {},
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


@functools.cache
def library_problem() -> str:
    """Load the C++ library once; the empty string, or why it is not there."""
    if not LIBRARY.exists():
        if BUILD_ERROR.exists():
            return f"not built: {BUILD_ERROR.read_text().strip()}"
        return f"not built: {LIBRARY} is missing (pip install --no-build-isolation -e . builds it)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY} does not load: {str(error).splitlines()[0]}"
    return ""


def choose(op: str, device_type: str, dtype: torch.dtype | None = None) -> Choice:
    """The backend that `op` runs on for a device type and, where given, a dtype."""
    if forced_reference():
        return Choice("reference", "forced by GPTDIST_OPS=reference")
    dtypes = COMPILED.get(device_type, {}).get(op)
    if dtypes is None:
        return Choice("reference", f"no {device_type} kernel for this op")
    if dtype is not None and dtype not in dtypes:
        return Choice("reference", f"the {device_type} kernel does not take {dtype}")
    problem = library_problem()
    if problem:
        return Choice("reference", problem)
    return Choice(device_type, "takes " + ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes))


def custom_op(name: str):
    """torch.library.custom_op for a functional op whose first argument is a tensor or a list of them.

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

        return torch.library.custom_op(name, mutates_args=())(without_autocast)

    return decorate


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a reference op computes in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
