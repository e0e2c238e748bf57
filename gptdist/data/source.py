"""The inputs of `prepare`, one after another: which documents they have, how far they are read, what was bad."""

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gptdist.data.corpus import embedded_documents
from gptdist.data.prepare_config import EMBEDDED, PrepareConfig
from gptdist.data.read import DocumentReader, ReadSettings, find_files
from gptdist.errors import UserError

_SHOWN = 20  # messages of bad records in the report


@dataclass(frozen=True)
class Source:
    """One of the inputs. No files: the embedded corpus."""

    name: str
    files: list[Path]


@dataclass
class Position:
    """What was read: all before this record of this file of this source."""

    source: int = 0
    file: int = 0
    row: int = 0


@dataclass
class BadRecords:
    """What could not be read and was left out."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, error: UserError) -> None:
        self.count += 1
        if len(self.examples) < _SHOWN:
            self.examples.append(str(error))


def find_sources(inputs: list[str]) -> list[Source]:
    """The sources of --input, every file in the first that names it. Raises UserError as `find_files` does."""
    seen: set[Path] = set()
    sources = []
    for name in dict.fromkeys(inputs):
        files = []
        for path in find_files(name) if name != EMBEDDED else ():
            resolved = path.resolve()
            if resolved not in seen:
                seen.add(resolved)
                files.append(path)
        if files or name == EMBEDDED:
            sources.append(Source(name, files))
    return sorted(sources, key=lambda source: source.name != EMBEDDED)


def files_digest(sources: list[Source]) -> str:
    """Hash of all files' names, sizes and times of change: whether an unfinished dataset was made from them."""
    digest = hashlib.sha256()
    for source in sources:
        for path in source.files:
            status = path.stat()
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def text_sha256(sources: list[Source]) -> str:
    """sha256 (hex) of what is in all files, one after another: whether a dataset of one text was made from them."""
    digest = hashlib.sha256()
    for source in sources:
        for path in source.files:
            digest.update(path.read_bytes())
    return digest.hexdigest()


class SourceReader:
    """Iterates over the documents of one source, from a position on, which it keeps up to date."""

    def __init__(self, source: Source, config: PrepareConfig, position: Position, bad: BadRecords):
        self._source = source
        longest = sys.maxsize if config.split == "tail" else config.max_document_chars
        self._settings = ReadSettings(config.text_field, config.document_separator, longest)
        self._on_bad: Callable[[UserError], None] | None = bad.add if config.skip_bad else None
        self._position = position
        self._done_bytes = sum(path.stat().st_size for path in source.files[: position.file])
        self._reader: DocumentReader | None = None

    @property
    def bytes_read(self) -> int:
        return self._done_bytes + (self._reader.bytes_read if self._reader else 0)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Yield (where it is from, text)."""
        position = self._position
        if self._source.name == EMBEDDED:
            for row, text in enumerate(embedded_documents(), start=1):
                if row > position.row:
                    position.row = row
                    yield f"{EMBEDDED}:{row}", text
            return
        for number in range(position.file, len(self._source.files)):
            path = self._source.files[number]
            start = position.row if number == position.file else 0
            self._reader = DocumentReader(path, self._settings, start=start, on_bad=self._on_bad)
            for text in self._reader:
                position.file, position.row = number, self._reader.row
                yield f"{path}:{self._reader.row}", text
            self._done_bytes += self._reader.bytes_read
            self._reader = None
            position.file, position.row = number + 1, 0
