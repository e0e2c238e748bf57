"""Compressed text files: which suffixes there are, and opening them as a stream of bytes.

gzip, bzip2 and xz come with Python; zstd does from Python 3.14 on, before that with `backports.zstd` (extra `data`).
"""

import bz2
import gzip
import lzma
import zlib
from pathlib import Path
from typing import BinaryIO

from gptdist.errors import MissingError

FORMATS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}


def format_of(path: Path) -> str | None:
    """The name of a file's compression, by its suffix; None: it has none."""
    return FORMATS.get(path.suffix.lower())


def decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    """A readable stream of the bytes inside `raw`, the open file `path`. Raises MissingError without its package."""
    match format_of(path):
        case "gzip":
            return gzip.GzipFile(fileobj=raw)
        case "bzip2":
            return bz2.BZ2File(raw)
        case "xz":
            return lzma.LZMAFile(raw)
        case "zstd":
            return zstd_module(path).ZstdFile(raw)
    return raw


def damage_errors(path: Path) -> tuple[type[Exception], ...]:
    """What reading a damaged or cut file raises; OSError, which bzip2 and gzip also use, is not among them."""
    errors = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, MemoryError)  # a dictionary beyond all memory
    return (*errors, zstd_module(path).ZstdError) if format_of(path) == "zstd" else errors


def zstd_module(path: Path):
    try:
        from compression import zstd
    except ImportError:
        try:
            from backports import zstd
        except ImportError as error:
            raise MissingError(f"{path}: .zst needs the package backports.zstd before Python 3.14: "
                               f"pip install 'gptdist[data]', or decompress the file") from error
    return zstd
