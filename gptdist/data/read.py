"""Documents from text, JSONL and Parquet files, streamed: no file, however large, needs to be in memory.

Plain text must be UTF-8; `.jsonl` and `.ndjson` have one JSON object a line; both may be compressed (.gz, .bz2, .xz,
.zst). `.parquet` is read by row group.
"""

import glob
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gptdist.data.compressed import FORMATS, damage_errors, decompressed, format_of
from gptdist.errors import UserError

BLANK_LINE = "blank-line"
_CHUNK_BYTES = 1 << 20
_MAX_LINE_BYTES = 256 << 20  # the longest JSONL line, so that a file without newlines cannot fill memory
_JSONL_SUFFIXES = {".jsonl", ".ndjson"}
_PARQUET_SUFFIXES = {".parquet", ".pq"}
_TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst"}  # what is taken from a directory; a named file may have any other
_UNSUPPORTED = {
    ".json": "write one JSON object a line and name the file .jsonl",
    ".csv": "export it as .jsonl or as plain text",
    ".zip": "unpack it first",
    ".tar": "unpack it first",
    ".7z": "unpack it first",
}


@dataclass(frozen=True)
class ReadSettings:
    """text_field: of JSONL objects, or the column of Parquet. separator: between documents of plain text: None (a file
    is one document), 'blank-line', or a literal string. max_document_chars: plain text longer than this is cut."""

    text_field: str
    separator: str | None
    max_document_chars: int


def find_files(pattern: str) -> list[Path]:
    """Return the files that a path, directory or glob (`**` allowed) names, in order of their paths.

    A directory stands for all text, JSONL and Parquet files in it, at any depth, hidden ones and links to directories
    left out. Raises UserError for a missing file, nothing found, or a type of file not supported.
    """
    path = Path(pattern)
    if path.is_dir():
        files = sorted(_walk(path))
        if not files:
            raise UserError(f"{pattern}: no {', '.join(sorted(_TEXT_SUFFIXES | _JSONL_SUFFIXES | _PARQUET_SUFFIXES))} "
                            f"file (or .gz, .bz2, .xz, .zst of them) in this directory; for others give a glob such as "
                            f"'{pattern.rstrip('/')}/**/*.py'")
    elif path.exists():
        files = [path]
    elif glob.has_magic(pattern):
        files = [Path(name) for name in sorted(glob.iglob(pattern, recursive=True)) if os.path.isfile(name)]
        if not files:
            raise UserError(f"{pattern}: no file matches this glob; check the path and quote the pattern")
    else:
        raise UserError(f"{pattern}: no such file; expected a text, JSONL or Parquet file, a directory, a glob, or the "
                        f"word embedded")
    for file in files:
        if file.suffix in _UNSUPPORTED:
            raise UserError(f"{file}: {file.suffix} files are not supported; {_UNSUPPORTED[file.suffix]}")
    return files


def _walk(root: Path) -> Iterator[Path]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        for name in names:
            path = Path(directory, name)
            if not name.startswith(".") and _content_suffix(path) in (
                    _TEXT_SUFFIXES | _JSONL_SUFFIXES | _PARQUET_SUFFIXES):
                yield path


def _content_suffix(path: Path) -> str:
    """The suffix that says what is in a file, without that of its compression."""
    return (path.with_suffix("") if path.suffix.lower() in FORMATS else path).suffix.lower()


class DocumentReader:
    """Iterates over the documents of one file."""

    def __init__(self, path: Path, settings: ReadSettings, *, start: int = 0,
                 on_bad: Callable[[UserError], None] | None = None):
        """start: records to leave out, as `row` counted them. on_bad: called for each record, row group or rest of a
        file that cannot be read, which is then left out; None raises the error."""
        self.path = path
        self.row = 0  # records read: lines of JSONL, rows of Parquet, documents of plain text
        self._settings = settings
        self._start = start
        self._on_bad = on_bad
        self._raw: BinaryIO | None = None
        self._n_rows = 0  # of Parquet

    @property
    def bytes_read(self) -> int:
        """Position in the file on disk (compressed bytes of a compressed one)."""
        if self._raw is not None and not self._raw.closed:
            return self._raw.tell()
        size = self.path.stat().st_size
        return size * self.row // self._n_rows if self._n_rows else size

    def __iter__(self) -> Iterator[str]:
        """Yield documents. Raises UserError naming the file and the byte or line at fault, MissingError for a package
        that is not there."""
        try:
            yield from self._documents()
        except UserError as error:
            self._bad(error)
        except damage_errors(self.path) as error:
            self._bad(self._damaged(error))
        except OSError as error:
            damaged = format_of(self.path) and error.errno is None
            self._bad(self._damaged(error) if damaged else
                      UserError(f"{self.path}: cannot be read ({error.strerror or error})"))

    def _documents(self) -> Iterator[str]:
        if self.path.stat().st_size == 0:
            raise UserError(f"{self.path}: the file is empty; expected text, remove it from the inputs")
        suffix = _content_suffix(self.path)
        if suffix in _PARQUET_SUFFIXES:
            yield from self._parquet()
            return
        with open(self.path, "rb") as self._raw:
            file = decompressed(self.path, self._raw)
            if suffix in _JSONL_SUFFIXES:
                yield from self._jsonl(file)
                return
            for document in self._plain(file):
                self.row += 1
                if self.row > self._start:
                    yield document

    def _bad(self, error: UserError) -> None:
        if self._on_bad is None:
            raise error
        self._on_bad(error)

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self.path}: damaged {format_of(self.path)} file after record {self.row} ({error}); copy it "
                         f"again")

    def _parquet(self) -> Iterator[str]:
        from gptdist.data.parquet import ParquetColumn

        column = ParquetColumn(self.path, self._settings.text_field)
        self._n_rows = column.n_rows
        for row, text in column.read(self._start, self._bad):
            self.row = row
            yield text
        self.row = column.n_rows

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
        while line := file.readline(_MAX_LINE_BYTES):
            self.row += 1
            if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise UserError(f"{self.path}:{self.row}: line longer than {_MAX_LINE_BYTES} bytes; is this JSONL?")
            if self.row <= self._start or line.isspace():
                continue
            try:
                text = self._json_text(line, self.row)
            except UserError as error:
                self._bad(error)
                continue
            yield text

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
