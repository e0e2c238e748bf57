"""index.json: which box of which tensor lies in which shard file, under which key.

{"format": 1, "tensors": {"model.wte.weight": {"dtype": "float32", "shape": [512, 64], "chunks": [
    {"offset": [0, 0], "shape": [256, 64], "file": "shard-00000.safetensors", "key": "model.wte.weight@0,0"}, ...
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gptdist.checkpoint.files import damaged, plain_name
from gptdist.checkpoint.shards import DTYPES
from gptdist.errors import UserError

FORMAT = 1
INDEX_NAME = "index.json"
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: `shape` elements starting at `offset`, stored whole as `key` of `file`."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True)
class Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]  # cover the tensor exactly, without overlap


Index = dict[str, Entry]


def encode(index: Index) -> bytes:
    """index.json, one line per tensor."""
    lines = []
    for key, entry in sorted(index.items()):
        chunks = [vars(chunk) for chunk in entry.chunks]
        value = {"dtype": str(entry.dtype).removeprefix("torch."), "shape": entry.shape, "chunks": chunks}
        lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return (f'{{"format": {FORMAT}, "tensors": {{\n' + ",\n".join(lines) + "\n}}\n").encode()


def decode(text: bytes, path: Path) -> Index:
    """Parse and check index.json; `path` is for the message. Raises UserError naming the tensor at fault."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise damaged(path, "it is not JSON") from None
    if not isinstance(data, dict) or not isinstance(data.get("tensors"), dict):
        raise damaged(path, "it has no table of tensors")
    check_format(data.get("format"), path)
    return {key: _entry(key, value, path) for key, value in data["tensors"].items()}


def check_format(found: object, path: Path) -> None:
    """Refuse every format but ours."""
    if found != FORMAT or type(found) is not int:
        raise UserError(
            f"{path}: checkpoint format {found!r}; this version of gptdist reads format {FORMAT}; "
            "use the version that wrote it, or another checkpoint"
        )


def _entry(key: str, value: object, path: Path) -> Entry:
    match value:
        case {"dtype": str(name), "shape": list(shape), "chunks": list(chunks)} if name in _DTYPE_NAMES:
            if not _sizes(shape):
                raise damaged(path, f"{key}: shape {shape} is not a list of sizes")
            entry = Entry(_DTYPE_NAMES[name], tuple(shape), tuple(_chunk(key, c, path) for c in chunks))
        case _:
            raise damaged(path, f"{key}: expected dtype, shape and chunks")
    if (fault := _cover_fault(entry.shape, entry.chunks)) is not None:
        raise damaged(path, f"{key}: {fault}")
    return entry


def _chunk(key: str, value: object, path: Path) -> Chunk:
    match value:
        case {"offset": list(offset), "shape": list(shape), "file": str(file), "key": str(name)}:
            if not plain_name(file):
                raise damaged(path, f"{key}: {file!r} is not the name of a file in this directory")
            if _sizes(offset) and _sizes(shape):
                return Chunk(tuple(offset), tuple(shape), file, name)
    raise damaged(path, f"{key}: a chunk needs offset, shape, file and key")


def _sizes(values: list) -> bool:
    return all(type(v) is int and 0 <= v < 2**63 for v in values)


def _cover_fault(shape: Sequence[int], chunks: Sequence[Chunk]) -> str | None:
    """Why the chunks do not tile the tensor, if they do not: each inside it, the sizes add up, and none overlap."""
    for c in chunks:
        inside = len(c.offset) == len(c.shape) == len(shape)
        if not inside or any(o + n > size for o, n, size in zip(c.offset, c.shape, shape, strict=True)):
            return f"chunk {list(c.shape)} at {list(c.offset)} does not fit into {list(shape)}"
    stored, wanted = sum(math.prod(c.shape) for c in chunks), math.prod(shape)
    if stored != wanted:
        return f"its chunks hold {stored} elements, its shape has {wanted}"
    if _overlap([c for c in chunks if math.prod(c.shape)], len(shape)):
        return "its chunks overlap"
    return None


def _overlap(chunks: list[Chunk], ndim: int) -> bool:
    """Sweep along the first dimension: a chunk can meet only those that begin before it and have not ended."""
    if ndim == 0:
        return len(chunks) > 1
    live: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda c: c.offset):
        live = [c for c in live if c.offset[0] + c.shape[0] > chunk.offset[0]]
        if any(_meet(c, chunk) for c in live):
            return True
        live.append(chunk)
    return False


def _meet(a: Chunk, b: Chunk) -> bool:
    spans = zip(a.offset, a.shape, b.offset, b.shape, strict=True)
    return all(ao < bo + bn and bo < ao + an for ao, an, bo, bn in spans)


