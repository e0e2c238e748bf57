"""Durable files: written once with their sha256 taken on the way, read back only when they are what was written."""

import errno
import hashlib
import os
import socket
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gptdist.errors import DamagedError, UserError

# Bytes copied, hashed and written at a time. This bounds the extra memory of a save or a load: two blocks at most live.
BLOCK_BYTES = 16 << 20
FLUSH_BYTES = 64 << 20  # written between two flushes to the disk, so that it works from the start

_ADVICE = {
    None: "free some disk space",  # numpy's, when not all of an array was written
    errno.ENOSPC: "free some disk space or keep fewer checkpoints",
    errno.EDQUOT: "free some of your disk quota or keep fewer checkpoints",
    errno.EFBIG: "raise the file size limit (ulimit -f)",
    errno.EACCES: "choose a directory you may write to",
    errno.EPERM: "choose a directory you may write to",
    errno.EROFS: "choose a directory that is not read-only",
    errno.ENOTDIR: "choose a path whose parents are all directories",
    errno.ENOENT: "check the path; every rank must see the same file system",
}


@dataclass(frozen=True)
class FileRecord:
    size: int  # bytes
    sha256: str  # 64 hex digits


def write_file(path: Path, blocks: Iterable) -> FileRecord:
    """Create `path` (it must not exist) from byte buffers, fsync it, and return its size and sha256.

    Hashing and the disk run beside writing: a stream never needs more memory than its largest block, and little is left
    for the last fsync to do.
    """
    digest, size, flushed, flush = hashlib.sha256(), 0, 0, None
    with naming(path), ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as flusher:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            for block in blocks:
                hashed = hasher.submit(digest.update, block)
                _write_all(fd, memoryview(block))
                hashed.result()
                size += len(block)
                if size - flushed >= FLUSH_BYTES and (flush is None or flush.done()):
                    _result(flush)
                    flushed, flush = size, flusher.submit(os.fdatasync, fd)
            _result(flush)
            os.fsync(fd)
        finally:
            flusher.shutdown()  # before the descriptor's number can mean another file
            os.close(fd)
    return FileRecord(size, digest.hexdigest())


def _result(flush: Future | None) -> None:
    """An error of the disk is told to one flush only: none may be lost."""
    if flush is not None:
        flush.result()


def _write_all(fd: int, view: memoryview) -> None:
    while len(view):
        view = view[os.write(fd, view) :]


def hash_file(path: Path) -> FileRecord:
    """The size and sha256 of an existing file. One block is read while another is hashed."""
    digest, size, hashed = hashlib.sha256(), 0, None
    with naming(path), open(path, "rb", buffering=0) as f, ThreadPoolExecutor(1) as hasher:
        buffer, other = (memoryview(bytearray(BLOCK_BYTES)) for _ in range(2))
        while n := f.readinto(buffer):
            if hashed is not None:
                hashed.result()
            hashed = hasher.submit(digest.update, buffer[:n])
            size += n
            buffer, other = other, buffer
    return FileRecord(size, digest.hexdigest())


def fsync_dir(path: Path) -> None:
    """Make the names in a directory durable."""
    with naming(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError the path it lacks: those of os.write and os.fsync name no file."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror or str(e), e.filename or str(path)) from e


@contextmanager
def user_errors(doing: str) -> Iterator[None]:
    """Turn an OSError into the UserError that names the file, this host, and what to do. `doing`: "save to"."""
    try:
        yield
    except OSError as e:
        advice = _ADVICE.get(e.errno, "check the disk and its file system")
        raise UserError(f"cannot {doing} {e.filename}: {e.strerror} (on {socket.gethostname()}); {advice}") from e


def damaged(path: Path, why: str) -> DamagedError:
    return DamagedError(f"damaged checkpoint: {path}: {why}; use another checkpoint")


def plain_name(name: object, folders: bool = False) -> bool:
    """Whether `name` is a relative file name that stays inside its directory and that a file can have; `folders` allows
    a/b."""
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    try:
        parts = os.fsencode(name).split(b"/")
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return (folders or len(parts) == 1) and all(part not in (b"", b".", b"..") and len(part) <= 255 for part in parts)
