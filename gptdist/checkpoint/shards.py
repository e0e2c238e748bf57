"""One safetensors file, streamed both ways.

The header is written first, from sizes known beforehand, then each tensor's bytes in turn: a save never holds a second
copy of the state. Reading goes straight into the target's memory where it can, else through one bounded block.
The format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gptdist.checkpoint.files import BLOCK_BYTES, FileRecord, naming, write_file
from gptdist.errors import UserError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors library, which must be able to open our files


@dataclass(frozen=True)
class Part:
    """A tensor to write: what the header says of it, and how to get it when its turn comes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    get: Callable[[], torch.Tensor]


def write_shard(path: Path, parts: Sequence[Part], metadata: Mapping[str, str] | None = None) -> FileRecord:
    """Stream `parts` into a new safetensors file; widest dtypes first, so that every tensor is aligned."""
    return write_file(path, _stream(sorted(parts, key=lambda part: -part.dtype.itemsize), metadata))


def _stream(parts: Sequence[Part], metadata: Mapping[str, str] | None) -> Iterator[memoryview | bytes]:
    yield _header(parts, metadata)
    buffer = torch.empty(BLOCK_BYTES, dtype=torch.uint8)  # one for all: a new one each time fragments the heap
    for part in parts:
        tensor = part.get().detach()
        assert (tensor.dtype, tuple(tensor.shape)) == (part.dtype, part.shape), part.key
        yield from byte_blocks(tensor, buffer)


def _header(parts: Sequence[Part], metadata: Mapping[str, str] | None) -> bytes:
    entries, end = {}, 0
    for part in parts:
        start, end = end, end + math.prod(part.shape) * part.dtype.itemsize
        entries[part.key] = {"dtype": DTYPES[part.dtype], "shape": part.shape, "data_offsets": [start, end]}
    assert len(entries) == len(parts), "two parts share a key"
    head = {"__metadata__": dict(metadata)} if metadata else {}
    text = json.dumps(head | entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def byte_blocks(tensor: torch.Tensor, buffer: torch.Tensor) -> Iterator[memoryview]:
    """The row-major bytes of a tensor of any device and stride, at most BLOCK_BYTES at a time.

    What is not plain CPU memory goes through `buffer` (uint8), which the next block overwrites.
    """
    if _is_plain(tensor, tensor.dtype):
        view = _bytes_of(tensor)
        for start in range(0, len(view), BLOCK_BYTES):
            yield view[start : start + BLOCK_BYTES]
    elif tensor.nbytes:
        yield from _copied_blocks(tensor.view(-1) if tensor.is_contiguous() else tensor, buffer.view(tensor.dtype))


def _copied_blocks(tensor: torch.Tensor, buffer: torch.Tensor) -> Iterator[memoryview]:
    if tensor.numel() <= len(buffer):
        block = buffer[: tensor.numel()]
        block.view(tensor.shape).copy_(tensor)
        yield _bytes_of(block)
    else:
        n = len(buffer) // (tensor.numel() // len(tensor))  # whole rows that fit; none if a row is too long
        for i in range(0, len(tensor), max(n, 1)):
            yield from _copied_blocks(tensor[i : i + n] if n else tensor[i], buffer)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor. (as_strided: dimensions of size 1 may have any stride.)"""
    return memoryview(tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy())


class ShardFile:
    """A safetensors file open for reading. Nothing in it is trusted beyond the bytes of the tensors."""

    def __init__(self, path: Path):
        self.path = path
        self._buffer = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
        with naming(path):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._size = os.fstat(self._fd).st_size
            self._header, self._data_start = self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._fd)

    def read(self, key: str, shape: Sequence[int], dtype: torch.dtype, offsets: Sequence[int], out: torch.Tensor):
        """Copy the box of `out`'s shape at `offsets` inside tensor `key` (of `shape`, `dtype`) into `out`.

        `out` may have any device, stride and floating dtype.
        """
        start = self._locate(key, tuple(shape), dtype)
        if out.ndim == 0:
            out, shape, offsets = out.view(1), (1,), (0,)
        if out.numel():
            self._read_box(start, tuple(shape), dtype, tuple(offsets), out)

    def _read_box(self, start: int, shape: tuple, dtype: torch.dtype, offsets: tuple, out: torch.Tensor) -> None:
        inner = shape[1:]
        row_bytes = math.prod(inner) * dtype.itemsize
        start += offsets[0] * row_bytes
        if tuple(out.shape[1:]) == inner and _is_plain(out, dtype):
            self._pread(_bytes_of(out), start)
        elif row_bytes <= BLOCK_BYTES:
            n = min(len(out), BLOCK_BYTES // row_bytes)
            # (n, *inner): whole rows, of which a part is wanted
            block = self._buffer[: n * row_bytes].view(dtype).view(n, *inner)
            window = (slice(None), *(slice(o, o + k) for o, k in zip(offsets[1:], out.shape[1:], strict=True)))
            for i in range(0, len(out), n):
                rows = block[: len(out) - i]
                self._pread(_bytes_of(rows), start + i * row_bytes)
                out[i : i + n].copy_(rows[window])
        else:
            for i in range(len(out)):
                self._read_box(start + i * row_bytes, inner, dtype, offsets[1:], out[i])

    def _pread(self, view: memoryview, start: int) -> None:
        with naming(self.path):
            while len(view):
                n = os.preadv(self._fd, [view], start)
                if n == 0:
                    raise self._damaged("it ends too early")
                view, start = view[n:], start + n

    def _read_header(self) -> tuple[dict, int]:
        if self._size < 8:
            raise self._damaged("it has no header")
        length = int.from_bytes(self._raw(8, 0), "little")
        if length > min(self._size - 8, _HEADER_LIMIT_BYTES):
            raise self._damaged(f"its header claims {length} bytes")
        try:
            header = json.loads(self._raw(length, 8))
        except (ValueError, RecursionError):
            raise self._damaged("its header is not JSON") from None
        if not isinstance(header, dict):
            raise self._damaged("its header is not a table")
        return header, 8 + length

    def _raw(self, size: int, start: int) -> bytearray:
        buffer = bytearray(size)
        self._pread(memoryview(buffer), start)
        return buffer

    def _locate(self, key: str, shape: tuple, dtype: torch.dtype) -> int:
        """The position of a tensor's first byte, after checking that the header agrees with the index."""
        size = math.prod(shape) * dtype.itemsize
        match self._header.get(key):
            case {"dtype": str(name), "shape": list(dims), "data_offsets": [int(a), int(b)]}:
                agrees = name == DTYPES[dtype] and tuple(dims) == shape and b - a == size
                if agrees and a >= 0 and self._data_start + b <= self._size:
                    return self._data_start + a
        raise self._damaged(f"its header does not hold {key!r} as {DTYPES[dtype]} {list(shape)}")

    def _damaged(self, why: str) -> UserError:
        return UserError(f"damaged shard file {self.path}: {why}; use another checkpoint")


def _is_plain(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_contiguous() and tensor.device.type == "cpu" and tensor.dtype == dtype
