"""Documents from text and JSONL files, streamed: no file, however large, needs to be in memory.

Plain text must be UTF-8; `.jsonl` and `.ndjson` have one JSON object a line; `.gz` of either is read as it is.
"""

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gptdist.errors import UserError

BLANK_LINE = "blank-line"
_CHUNK_BYTES = 1 << 20
_MAX_LINE_BYTES = 256 << 20  # the longest JSONL line, so that a file without newlines cannot fill memory
_JSONL_SUFFIXES = {".jsonl", ".ndjson"}
_UNSUPPORTED = {
    ".json": "write one JSON object a line and name the file .jsonl",
    ".parquet": "export it as .jsonl",
    ".csv": "export it as .jsonl or as plain text",
    ".zip": "unpack it first",
    ".xz": "unpack it first",
    ".zst": "unpack it first",
    ".bz2": "unpack it first",
}


@dataclass(frozen=True)
class ReadSettings:
    """text_field: of JSONL objects. separator: between documents of plain text: None (a file is one document),
    'blank-line', or a literal string. max_document_chars: plain text longer than this is cut into documents."""

    text_field: str
    separator: str | None
    max_document_chars: int


def find_files(inputs: list[str]) -> list[Path]:
    """Return the files that paths and globs (`**` allowed) name, in order, each once.

    Raises UserError for a missing file, a directory, a glob without matches, or a type of file not supported.
    """
    files: dict[Path, Path] = {}
    for pattern in inputs:
        for path in _matches(pattern):
            suffix = "".join(path.suffixes[-1:])
            if suffix in _UNSUPPORTED:
                raise UserError(f"{path}: {suffix} files are not supported; {_UNSUPPORTED[suffix]}")
            files.setdefault(path.resolve(), path)
    return list(files.values())


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        raise UserError(f"{pattern}: is a directory; give files or a glob such as '{pattern.rstrip('/')}/**/*.txt'")
    if path.exists():
        return [path]
    if not glob.has_magic(pattern):
        raise UserError(f"{pattern}: no such file; expected a text or JSONL file, a glob, or the word embedded")
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    if not found:
        raise UserError(f"{pattern}: no file matches this glob; check the path and quote the pattern")
    return found


class DocumentReader:
    """Iterates over the documents of one file."""

    def __init__(self, path: Path, settings: ReadSettings):
        self.path = path
        self._settings = settings
        self._raw: BinaryIO | None = None

    @property
    def bytes_read(self) -> int:
        """Position in the file on disk (compressed bytes of a .gz)."""
        return self._raw.tell() if self._raw is not None and not self._raw.closed else self.path.stat().st_size

    def __iter__(self) -> Iterator[str]:
        """Yield documents. Raises UserError naming the file and the byte or line at fault."""
        try:
            if self.path.stat().st_size == 0:
                raise UserError(f"{self.path}: the file is empty; expected text, remove it from the inputs")
            with open(self.path, "rb") as self._raw:
                is_gzip = self.path.suffix == ".gz"
                file = gzip.GzipFile(fileobj=self._raw) if is_gzip else self._raw
                name = self.path.with_suffix("") if is_gzip else self.path
                read = self._jsonl if name.suffix in _JSONL_SUFFIXES else self._plain
                yield from read(file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{self.path}: damaged gzip file ({error}); copy it again") from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error})") from error

    def _plain(self, file: BinaryIO) -> Iterator[str]:
        separator = "\n\n" if self._settings.separator == BLANK_LINE else self._settings.separator
        limit = self._settings.max_document_chars
        pending = ""
        for text in _decoded_chunks(file, self.path):
            pending += text
            if separator is not None:
                *complete, pending = pending.split(separator)
                for document in complete:
                    yield from _cut(document, limit)
            # A whole chunk beyond the limit is needed so that `_cut` can look for a paragraph's end.
            while len(pending) > 2 * limit:
                end = _cut_position(pending, limit)
                yield pending[:end]
                pending = pending[end:]
        yield from _cut(pending, limit)

    def _jsonl(self, file: BinaryIO) -> Iterator[str]:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES):
            number += 1
            if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise UserError(f"{self.path}:{number}: line longer than {_MAX_LINE_BYTES} bytes; is this JSONL?")
            if not line.isspace():
                yield self._json_text(line, number)

    def _json_text(self, line: bytes, number: int) -> str:
        where, field = f"{self.path}:{number}", self._settings.text_field
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: invalid UTF-8 at byte {error.start} of the line; convert the file") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); expected one JSON object a line") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object with {field!r}, got {type(record).__name__}")
        if field not in record:
            found = ", ".join(sorted(record)) or "none"
            raise UserError(f"{where}: no field {field!r}; fields found: {found}; pass one of them as --text-field")
        if not isinstance(record[field], str):
            raise UserError(f"{where}: field {field!r} is {type(record[field]).__name__}, expected a string")
        return record[field]


def _decoded_chunks(file: BinaryIO, path: Path) -> Iterator[str]:
    r"""Yield a file's text in pieces with \r\n as \n, never breaking a character or an \r\n.

    Raises UserError with the byte offset of invalid UTF-8 or of a NUL byte.
    """
    offset, pending = 0, b""  # `pending` begins at byte `offset`
    while chunk := file.read(_CHUNK_BYTES):
        data = pending + chunk
        if (nul := data.find(b"\0")) >= 0:
            raise UserError(
                f"{path}: NUL byte at offset {offset + nul}, so this is binary or UTF-16; expected UTF-8 text"
            )
        end = _complete_length(data)
        text = _decode(data[:end], path, offset)
        yield (text.removeprefix("\ufeff") if offset == 0 else text).replace("\r\n", "\n")
        offset, pending = offset + end, data[end:]
    yield _decode(pending, path, offset)


def _complete_length(data: bytes) -> int:
    """Return the length of `data` without a last character or \r\n that may be incomplete (0 to 3 bytes)."""
    if data.endswith(b"\r"):
        return len(data) - 1
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:  # a lead byte: of 2, 3 or 4 bytes
            length = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return len(data) - back if length > back else len(data)
        if byte < 0x80:
            break
    return len(data)


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: invalid UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}, {error.reason}); "
            "convert the file to UTF-8"
        ) from None


def _cut(document: str, limit: int) -> Iterator[str]:
    """Yield a document in pieces of about `limit` characters, cut where a paragraph ends."""
    while len(document) > limit:
        end = _cut_position(document, limit)
        if end >= len(document):
            break
        yield document[:end]
        document = document[end:]
    if document and not document.isspace():
        yield document


def _cut_position(text: str, limit: int) -> int:
    """Return where to cut: after the first paragraph's end at or after `limit`, else line's end, else space.

    Looks no further than twice the limit, and cuts there if there is none of them.
    """
    for boundary in (r"\n\n+", r"\n", r"\s"):
        if match := re.compile(boundary).search(text, limit, 2 * limit):
            return match.end()
    return min(2 * limit, len(text))
