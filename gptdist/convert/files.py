"""Reading other programs' files: lazily, and without ever running code that one of them holds."""

import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptdist.checkpoint.files import user_errors
from gptdist.checkpoint.shards import DTYPES, Part
from gptdist.errors import UserError
from gptdist.faults.bad_steps import is_finite

# Both texts in which torch names what a pickle asks for.
_ASKED = re.compile(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)")
_DTYPE_OF_NAME = {name: dtype for dtype, name in DTYPES.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table. Raises UserError for anything else."""
    with user_errors("read"):
        data = path.read_bytes()
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); get the file again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a JSON {type(values).__name__}, expected a table; get the file again")
    return values


def read_safetensors(path: Path) -> dict[str, Part]:
    """The tensors of a safetensors file by name, none of them read yet."""
    try:
        with user_errors("read"), safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            found = {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}
    except SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}); get the file again") from None
    for name, (dtype, _) in found.items():
        if dtype not in _DTYPE_OF_NAME:
            raise UserError(f"{path}: {name} has dtype {dtype}, expected one of {', '.join(_DTYPE_OF_NAME)}")
    return {name: Part(name, _DTYPE_OF_NAME[dtype], shape, _safetensor(path, name))
            for name, (dtype, shape) in found.items()}


def _safetensor(path: Path, name: str) -> Callable[[], Tensor]:
    """Opens the file for one tensor only: its pages are given back with the tensor."""
    def get() -> Tensor:
        with user_errors("read"), safe_open(path, "pt") as file:
            return finite(file.get_tensor(name), name, path)
    return get


def read_torch(path: Path, stand_ins: Mapping[str, Callable] | None = None) -> Any:
    """What torch.save wrote, tensors mapped from disk. Only tensors and plain containers are ever built.

    stand_ins: full name of a class that the pickle may name -> what is built in its place.
    """
    allowed = [(stand_in, name) for name, stand_in in (stand_ins or {}).items()]
    with user_errors("read"), open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"  # only the format since torch 1.6 can be mapped
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings(action="ignore"):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except Exception as error:  # a hostile or cut file makes torch fail in any way
            raise _refused(path, error) from error


def _refused(path: Path, error: Exception) -> UserError:
    text = str(error)
    if isinstance(error, pickle.UnpicklingError) and (named := _ASKED.search(text)):
        return UserError(f"{path}: its pickle asks for {named[1]}, which is no tensor: refused, nothing of it was run; "
                         f"save the model as safetensors where it was made")
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text:  # torch's text advises to drop the check
        return UserError(f"{path}: no file of tensors that torch.save wrote, or not whole: refused, nothing of it "
                         f"was run; get the file again, or save the model as safetensors where it was made")
    first = (text.splitlines() or [""])[0].partition(". ")[0][:200]  # its sentence; advice of torch's follows
    return UserError(f"{path} is not a complete file of torch.save ({type(error).__name__}: {first}); "
                     f"get the file again")


def tensor_parts(values: object, where: Path) -> dict[str, Part]:
    """The tensors of a state dict by name. Raises UserError if it is none."""
    if not isinstance(values, Mapping) or not all(isinstance(v, Tensor) for v in values.values()):
        raise UserError(f"{where}: expected a table of tensors by name, got {type(values).__name__}; "
                        f"save the model's state_dict()")
    for name, value in values.items():
        if not is_plain(value):
            raise UserError(f"{where}: {name} is no plain tensor that the file holds whole ({value.layout}, "
                            f"{value.device.type}, shape {tuple(value.shape)}); save dense, contiguous weights")
    return {str(name): Part(str(name), value.dtype, tuple(value.shape), partial(finite, value, str(name), where))
            for name, value in values.items()}


def is_plain(value: Tensor) -> bool:
    """Whether a tensor is dense and in memory, and no larger than its bytes there: strides may repeat some of them."""
    return (type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided and not value.is_quantized
            and value.device.type == "cpu"
            and value.numel() * value.element_size() <= value.untyped_storage().nbytes())


def finite(value: Tensor, name: str, where: Path) -> Tensor:
    """`value`, unless it has a NaN or an infinity: then UserError."""
    if not is_finite(value):
        raise UserError(f"{where}: {name} has values that are not finite: the model is broken; use an earlier save")
    return value


def memory_part(name: str, value: Tensor) -> Part:
    """A tensor that is in memory, or mapped from disk."""
    return Part(name, value.dtype, tuple(value.shape), lambda: value)


def to_json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def listed(names: Sequence[str]) -> str:
    """The first names of many, for a message."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
