"""Checkpoints written and read one tensor at a time, in one process: for conversions and `gptdist verify`.

No model is held in memory: a `Part` gets its tensor when its turn to be written comes, and a reader reads one box.
"""

import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from gptdist.checkpoint.files import fsync_dir, naming, user_errors, write_file
from gptdist.checkpoint.index import INDEX_NAME, Chunk, Entry, encode
from gptdist.checkpoint.shards import Part, ShardFile, write_shard
from gptdist.checkpoint.store import checked_index, refuse_existing, seal

SHARD_BYTES = 4 << 30  # of a converted checkpoint's files
READ_BYTES = 64 << 20  # of a tensor that `TensorReader.boxes` holds at a time


def write_checkpoint(path: Path, step: int, parts: Sequence[Part], files: Mapping[str, bytes],
                     shard_bytes: int = SHARD_BYTES) -> None:
    """Write the checkpoint directory `path` from lazily read tensors. Atomic; UserError if `path` exists."""
    with new_directory(path) as temporary:
        records, index = {}, {}
        for number, group in enumerate(groups(parts, shard_bytes)):
            name = f"shard-{number:05d}.safetensors"
            records[name] = write_shard(temporary / name, group)
            for part in group:
                chunk = Chunk((0,) * len(part.shape), part.shape, name, part.key)
                index[part.key] = Entry(part.dtype, part.shape, (chunk,))
        records[INDEX_NAME] = write_file(temporary / INDEX_NAME, [encode(index)])
        seal(temporary, step, records, files)


def groups(parts: Sequence[Part], limit_bytes: int) -> list[list[Part]]:
    """The parts in their order, cut into files of at most `limit_bytes` of tensors (a larger tensor is alone)."""
    result, size = [], 0
    for part in parts:
        n = part_bytes(part)
        if not result or size + n > limit_bytes:
            result.append([])
            size = 0
        result[-1].append(part)
        size += n
    return result


def part_bytes(part: Part) -> int:
    return math.prod(part.shape) * part.dtype.itemsize


@contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """A temporary directory beside `final`, which gets that name if the block ends without an error."""
    with _renamed(final, os.mkdir, shutil.rmtree) as temporary:
        yield temporary
        fsync_dir(temporary)


@contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """The name of a temporary file beside `final`, which gets that name if the block ends without an error."""
    with _renamed(final, lambda path: None, Path.unlink) as temporary:
        yield temporary
        fsync_dir(temporary)  # a file's bytes the same way


@contextmanager
def _renamed(final: Path, create: Callable[[Path], None], remove: Callable[[Path], None]) -> Iterator[Path]:
    refuse_existing(final)
    temporary = final.with_name(f".tmp-{final.name}-{secrets.token_hex(4)}")
    with user_errors("save to"):
        try:
            with naming(final.parent):
                final.parent.mkdir(parents=True, exist_ok=True)
                create(temporary)
            yield temporary
            refuse_existing(final)
            with naming(final):
                os.rename(temporary, final)
            fsync_dir(final.parent)
        except BaseException:
            if os.path.lexists(temporary):
                remove(temporary)
            raise


class TensorReader:
    """The tensors of a complete checkpoint, read one at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.index = checked_index(path)

    def read(self, key: str) -> Tensor:
        """A whole tensor in its stored dtype."""
        entry = self.index[key]
        out = torch.empty(entry.shape, dtype=entry.dtype)
        for chunk in entry.chunks:
            window = tuple(slice(o, o + n) for o, n in zip(chunk.offset, chunk.shape, strict=True))
            self._read(entry, chunk, (0,) * len(chunk.shape), out[window])
        return out

    def boxes(self, key: str) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        """(file, offset in the tensor, values) of every stored piece, at most READ_BYTES (or one row) at a time."""
        entry = self.index[key]
        for chunk in entry.chunks:
            if not chunk.shape:
                out = torch.empty((), dtype=entry.dtype)
                self._read(entry, chunk, (), out)
                yield chunk.file, (), out
                continue
            row_bytes = math.prod(chunk.shape[1:]) * entry.dtype.itemsize
            rows = max(1, READ_BYTES // max(row_bytes, 1))
            for start in range(0, chunk.shape[0], rows):
                out = torch.empty((min(rows, chunk.shape[0] - start), *chunk.shape[1:]), dtype=entry.dtype)
                self._read(entry, chunk, (start, *(0,) * (len(chunk.shape) - 1)), out)
                yield chunk.file, (chunk.offset[0] + start, *chunk.offset[1:]), out

    def _read(self, entry: Entry, chunk: Chunk, offsets: tuple[int, ...], out: Tensor) -> None:
        with user_errors("read"), ShardFile(self.path / chunk.file) as shard:
            shard.read(chunk.key, chunk.shape, entry.dtype, offsets, out)
