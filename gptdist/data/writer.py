"""Writes dataset directories: streamed, hashed on the way, complete or not there at all."""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gptdist.data.format import FORMAT, INDEX_DTYPE, META_NAME, STREAM_DTYPES, stream_file, token_dtype
from gptdist.errors import UserError

DEFAULT_SHARD_TOKENS = 100_000_000
_BUFFER_TOKENS = 1 << 20
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a new directory beside `path`; rename it to `path` when the block ends well, remove it when it does not.

    An existing non-empty `path` is refused unless `overwrite`, and then only if it is a dataset (has meta.json or
    report.json). It is moved aside before the rename and put back should the rename fail; between the two renames
    `path` does not exist for a moment. Every file is flushed to disk before the rename. What a
    process of this host that was killed left beside `path` is removed first.
    """
    path = Path(os.path.abspath(path))
    _check_output(path, overwrite)
    _remove_leftovers(path)
    temporary = path.with_name(f"{path.name}.tmp-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{path}: cannot write here ({error.strerror}); choose another output") from error
    try:
        yield temporary
        _sync_tree(temporary)
        _move_into_place(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _WRITE_ERRORS:
            raise UserError(f"{path}: writing failed ({error}); nothing was left behind") from error
        raise


@contextmanager
def resumable_directory(path: str | Path, overwrite: bool, state_name: str, check: Callable[[Path], None]
                        ) -> Iterator[Path]:
    """As `atomic_directory`, for long work that saves its state: the directory is `path` with `.partial` added.

    What a killed process left there is given again if it has the file `state_name`, and `check` raises nothing; it is
    also kept when this process is interrupted. An error removes it. A lock keeps two processes out of one directory.
    """
    path = Path(os.path.abspath(path))
    _check_output(path, overwrite)
    _remove_leftovers(path)
    working = path.with_name(path.name + ".partial")
    try:
        working.mkdir(parents=True, exist_ok=True)
        lock = os.open(working, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path}: cannot write here ({error.strerror}); choose another output") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{working}: another process is preparing {path}; wait for it, or choose another "
                            f"output") from None
        if (working / state_name).exists():
            check(working)
        if not (working / state_name).exists():
            _clear(working)
        try:
            yield working
            _sync_tree(working)
            _move_into_place(working, path)
        except BaseException as error:
            if isinstance(error, Exception) or not (working / state_name).exists():
                shutil.rmtree(working, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _WRITE_ERRORS:
                raise UserError(f"{path}: writing failed ({error}); nothing was left behind") from error
            raise
    finally:
        os.close(lock)


def _clear(directory: Path) -> None:
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


class ShardWriter:
    """Writes the streams and the document index of one shard, hashing as it goes."""

    def __init__(self, directory: Path, name: str, streams: dict[str, str], n_tokens: int = 0, n_documents: int = 0):
        """streams: stream name -> dtype name, as in meta.json. n_tokens, n_documents: what its files have to keep."""
        self.n_tokens = n_tokens
        self._directory = directory
        self._name = name
        self._files = {
            stream: HashingFile(directory / stream_file(name, stream), STREAM_DTYPES[dtype], n_tokens)
            for stream, dtype in streams.items()
        }
        self._index = HashingFile(directory / f"{name}.idx", INDEX_DTYPE, n_documents)
        self._n_documents = n_documents

    def sync(self) -> dict[str, int]:
        """Flush to disk; return what the constructor goes on from."""
        for file in [*self._files.values(), self._index]:
            file.sync()
        return {"n_tokens": self.n_tokens, "n_documents": self._n_documents}

    def add(self, document: dict[str, np.ndarray]) -> None:
        """Append one document: stream name -> (n_tokens,)."""
        self._index.write(np.array([self.n_tokens], INDEX_DTYPE))
        self._n_documents += 1
        for stream, file in self._files.items():
            file.write(document[stream])
        self.n_tokens += len(document["tokens"])

    def close(self) -> dict:
        """Flush to disk and return this shard's entry of meta.json."""
        files = [*self._files.values(), self._index]
        return {
            "name": self._name,
            "n_tokens": self.n_tokens,
            "n_documents": self._n_documents,
            "files": {file.path.name: file.close() for file in files},
        }

    def abort(self) -> None:
        for file in [*self._files.values(), self._index]:
            file.abort()


class HashingFile:
    """A file of one dtype that collects small arrays, and hashes what it writes."""

    def __init__(self, path: Path, dtype: np.dtype, keep: int = 0):
        """keep: elements that the file already has; what is beyond them is cut off."""
        self.path = path
        self._dtype = dtype
        self._size = keep * dtype.itemsize
        self._file = open(path, "r+b" if keep else "wb", buffering=0)  # noqa: SIM115 (closed by close or abort)
        self._file.truncate(self._size)
        self._digest = hashlib.file_digest(self._file, "sha256") if keep else hashlib.sha256()
        self._pending: list[np.ndarray] = []
        self._n_pending = 0

    def write(self, values: np.ndarray) -> None:
        self._pending.append(values)
        self._n_pending += len(values)
        if self._n_pending >= _BUFFER_TOKENS:
            self._flush()

    def sync(self) -> None:
        self._flush()
        os.fsync(self._file.fileno())

    def close(self) -> dict:
        """Flush to disk; return {size in bytes, sha256}."""
        self.sync()
        self._file.close()
        return {"size": self._size, "sha256": self._digest.hexdigest()}

    def abort(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        if self._pending:
            raw = np.concatenate(self._pending).astype(self._dtype, copy=False).tobytes()
            self._digest.update(raw)
            view = memoryview(raw)
            while view:  # a raw file may write less than it was given
                view = view[self._file.write(view) :]
            self._size += len(raw)
        self._pending, self._n_pending = [], 0


class DatasetWriter:
    """Writes one split directory, a new shard whenever the next document would exceed `shard_tokens`.

    Documents are never cut, so a shard is larger than `shard_tokens` only if it is one document.
    Used as a context manager: leaving normally writes meta.json; an exception closes the files. Pass a directory
    from `atomic_directory`, or use `write_dataset`, for the all-or-nothing guarantee.
    """

    def __init__(
        self,
        directory: Path,
        *,
        tokenizer_hash: str,
        vocab_size: int,
        eot: int,
        shard_tokens: int = DEFAULT_SHARD_TOKENS,
        loss_mask: bool = False,
    ):
        if shard_tokens < 1:
            raise UserError(f"shard_tokens is {shard_tokens}, expected at least 1")
        self.n_tokens = 0
        self.n_documents = 0
        self.dtype = token_dtype(vocab_size)
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._identity = {"tokenizer_hash": tokenizer_hash, "vocab_size": vocab_size, "eot": eot}
        self._shard_tokens = shard_tokens
        self._streams = {"tokens": self.dtype} | ({"loss_mask": "uint8"} if loss_mask else {})
        self._shard: ShardWriter | None = None
        self._shards: list[dict] = []

    def add(self, tokens: np.ndarray, loss_mask: np.ndarray | None = None) -> None:
        """Append one document, ids (n_tokens,) with n_tokens >= 1, and its loss mask (n_tokens,) of 0 and 1.

        Raises ValueError when ids are out of range or the mask does not fit.
        """
        document = self._checked(tokens, loss_mask)
        if self._shard is not None and self._shard.n_tokens + len(tokens) > self._shard_tokens:
            self._shards.append(self._shard.close())
            self._shard = None
        if self._shard is None:
            self._shard = ShardWriter(self._directory, f"shard-{len(self._shards):05d}", self._streams)
        self._shard.add(document)
        self.n_tokens += len(tokens)
        self.n_documents += 1

    def state(self) -> dict:
        """What `restore` goes on from; all of it is on disk."""
        return {"shards": self._shards, "open": self._shard.sync() if self._shard is not None else None,
                "n_tokens": self.n_tokens, "n_documents": self.n_documents}

    def restore(self, state: dict) -> None:
        """Go on from a state of a writer of this directory; later shards and the rest of the open one are dropped."""
        self.n_tokens, self.n_documents, self._shards = state["n_tokens"], state["n_documents"], state["shards"]
        known = {f"shard-{number:05d}" for number in range(len(self._shards) + (state["open"] is not None))}
        for path in self._directory.glob("shard-*"):
            if path.name.partition(".")[0] not in known:
                path.unlink()
        if state["open"] is not None:
            self._shard = ShardWriter(self._directory, f"shard-{len(self._shards):05d}", self._streams, **state["open"])

    def close(self) -> dict:
        """Finish the last shard, write meta.json and return what it says."""
        if self._shard is not None:
            self._shards.append(self._shard.close())
            self._shard = None
        meta = {
            "format": FORMAT,
            **self._identity,
            "dtype": self.dtype,
            "n_tokens": self.n_tokens,
            "n_documents": self.n_documents,
            "streams": self._streams,
            "shards": self._shards,
        }
        (self._directory / META_NAME).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        return meta

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        if exception_type is None:
            self.close()
        elif self._shard is not None:
            self._shard.abort()

    def _checked(self, tokens: np.ndarray, loss_mask: np.ndarray | None) -> dict[str, np.ndarray]:
        vocab_size = self._identity["vocab_size"]
        if len(tokens) == 0:
            raise ValueError("a document has no tokens, expected at least its eot")
        if tokens.max() >= vocab_size or (tokens.dtype.kind != "u" and tokens.min() < 0):
            raise ValueError(f"token ids are in [{tokens.min()}, {tokens.max()}], expected [0, {vocab_size})")
        document = {"tokens": tokens.astype(STREAM_DTYPES[self.dtype], copy=False)}
        if (loss_mask is not None) != ("loss_mask" in self._streams):
            raise ValueError(f"loss_mask {'given' if loss_mask is not None else 'missing'}; streams: {self._streams}")
        if loss_mask is not None:
            if loss_mask.shape != tokens.shape:
                raise ValueError(f"loss_mask has shape {loss_mask.shape}, expected {tokens.shape}")
            document["loss_mask"] = loss_mask.astype(np.uint8)
        return document


@contextmanager
def write_dataset(path: str | Path, *, overwrite: bool = False, **settings) -> Iterator[DatasetWriter]:
    """Write the split directory `path` atomically; `settings` are DatasetWriter's."""
    with atomic_directory(path, overwrite) as temporary, DatasetWriter(temporary, **settings) as writer:
        yield writer


def _check_output(path: Path, overwrite: bool) -> None:
    if path.is_file():
        raise UserError(f"{path}: is a file, expected a directory to create; choose another output")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{path}: exists and is not empty; choose another --output, or pass --overwrite")
    if not any((path / name).exists() for name in (META_NAME, "report.json")):
        raise UserError(f"{path}: is not a dataset (no {META_NAME} or report.json), so it is not overwritten")


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary directories of `path` whose process ran on this host and is gone.

    The host is in the name because process ids of another one, on a shared file system, mean nothing here. An old
    dataset that was moved aside goes only if `path` is there: killed between the two renames, it is the only copy.
    """
    name = re.compile(rf"{re.escape(f'{path.name}.tmp-{socket.gethostname()}-')}(\d+)-[0-9a-f]{{8}}(\.old)?")
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        match = name.fullmatch(entry.name)
        if match and not _is_alive(int(match[1])) and (match[2] is None or path.is_dir()):
            shutil.rmtree(entry, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's process; no process id at all, so not ours to judge
        return True
    return True


def _move_into_place(temporary: Path, path: Path) -> None:
    aside = temporary.with_name(temporary.name + ".old")
    if path.exists():
        path.rename(aside)
    try:
        temporary.rename(path)
    except OSError:
        if aside.exists():
            aside.rename(path)
        raise
    _sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
