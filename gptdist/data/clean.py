"""Filters of documents: the basic ones, and the `Cleaner` that runs a list of filters and counts what each let through.

A filter takes the texts of a batch, in order, and gives for each the text that goes on, or why it was dropped; what it
gives never depends on where batches end. Characters are Unicode code points.
"""

import hashlib
import heapq
import re
import sqlite3
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

# C0 and C1 controls except \t and \n, DEL, the byte order mark, and lone surrogates (JSON escapes can make them, and
# they have no UTF-8 form).
_ASCII_CONTROL = bytes(i for i in [*range(32), 127] if i not in b"\t\n")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")
_DIGEST_BYTES = 16


@dataclass
class FilterCount:
    """Documents and characters that went into one filter and came out of it."""

    documents_in: int = 0
    documents_out: int = 0
    characters_in: int = 0
    characters_out: int = 0

    def add(self, before: str, after: str | None) -> None:
        """Count one document; `after` is None when the filter dropped it."""
        self.documents_in += 1
        self.characters_in += len(before)
        if after is not None:
            self.documents_out += 1
            self.characters_out += len(after)


def remove_control(text: str) -> str:
    r"""Turn \r\n and \r into \n and remove control characters other than \n and \t."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.isascii():  # bytes.translate is about 20 times faster than the regular expression
        raw = text.encode("ascii")
        kept = raw.translate(None, _ASCII_CONTROL)
        return text if len(kept) == len(raw) else kept.decode("ascii")
    return _CONTROL.sub("", text)


def normalize_nfc(text: str) -> str:
    """Return Unicode NFC; most text is in it already, and ASCII always is."""
    if text.isascii() or unicodedata.is_normalized("NFC", text):
        return text
    return unicodedata.normalize("NFC", text)


def long_enough(text: str, min_chars: int) -> bool:
    """Whether `text` has at least `min_chars` characters, whitespace at both ends not counted."""
    return len(text.strip()) >= min_chars


def text_digest(text: str) -> bytes:
    """Return the 16-byte BLAKE2b digest of the text's UTF-8 bytes."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=_DIGEST_BYTES).digest()


class SeenDigests:
    """Set of 16-byte digests in bounded memory.

    In memory a document costs about 120 bytes (49 for the bytes object, rounded up, and its share of the hash table);
    past `max_in_memory` (default 2 M: about 240 MB) all digests move to a SQLite file in `directory`, about 30 bytes
    a document on disk, and memory stays at SQLite's cache (64 MB). A collision, dropping a document that is not a
    duplicate, has probability n^2 / 2^129: below 1e-18 for 10 billion documents.
    """

    def __init__(self, directory: Path, max_in_memory: int = 2_000_000):
        self._directory = directory
        self._max_in_memory = max_in_memory
        self._seen: set[bytes] = set()
        self._database: sqlite3.Connection | None = None

    def add(self, digest: bytes) -> bool:
        """Record `digest`; return whether it is new."""
        if self._database is not None:
            return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1
        if digest in self._seen:
            return False
        self._seen.add(digest)
        if len(self._seen) > self._max_in_memory:
            self._spill()
        return True

    def close(self) -> None:
        """Close and delete the file, if there is one."""
        if self._database is not None:
            self._database.close()
            self._path.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self._directory / "seen-digests.sqlite"

    def _spill(self) -> None:
        self._path.unlink(missing_ok=True)  # what a kill left: a run that goes on has its digests from the log
        database = sqlite3.connect(self._path, isolation_level=None)
        # The file is scratch: no journal and no syncing, because nothing reads it after a crash.
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.execute("PRAGMA cache_size = -65536")
        database.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        database.execute("BEGIN")
        database.executemany("INSERT INTO seen VALUES (?)", ((digest,) for digest in sorted(self._seen)))
        self._seen.clear()
        self._database = database


@dataclass(frozen=True)
class Dropped:
    """In place of a text: it was dropped. rule: which of the filter's names. reason: such as `0.31 > 0.2`."""

    rule: str
    reason: str = ""


class Filter(Protocol):
    names: Sequence[str]  # of what it may drop for, in the order it looks; counted one by one

    def __call__(self, texts: list[str]) -> list[str | Dropped]: ...


class Each:
    """A filter of a function of one text that returns the text to go on with, or None to drop it."""

    def __init__(self, name: str, function: Callable[[str], str | None], reason: str = ""):
        self.names = (name,)
        self._function = function
        self._dropped = Dropped(name, reason)

    def __call__(self, texts: list[str]) -> list[str | Dropped]:
        results = map(self._function, texts)
        return [self._dropped if text is None else text for text in results]


class Duplicates:
    """Drops texts that were seen before. Its digests also go to `log`, where there is one, for `restore`."""

    names = ("duplicates",)

    def __init__(self, seen: SeenDigests):
        self._seen = seen
        self.log: Callable[[bytes], object] = lambda digest: None

    def __call__(self, texts: list[str]) -> list[str | Dropped]:
        return [text if self._is_new(text_digest(text)) else Dropped("duplicates") for text in texts]

    def _is_new(self, digest: bytes) -> bool:
        is_new = self._seen.add(digest)
        if is_new:
            self.log(digest)
        return is_new

    def restore(self, logged: bytes) -> None:
        """Take what `log` was given before."""
        for start in range(0, len(logged), _DIGEST_BYTES):
            self._seen.add(logged[start : start + _DIGEST_BYTES])


class Samples:
    """A few of the dropped texts, the same whatever the order and the batches: those with the smallest digests."""

    def __init__(self, limit: int, excerpt_chars: int = 400):
        self._limit = limit
        self._excerpt_chars = excerpt_chars
        self._heap: list[tuple[int, str, str, str]] = []  # (-digest, where, reason, excerpt)

    def add(self, text: str, where: str, reason: str) -> None:
        if self._limit == 0:
            return
        key = -int.from_bytes(text_digest(text[:10_000])[:8], "little")
        if len(self._heap) < self._limit or key > self._heap[0][0]:
            heapq.heappush(self._heap, (key, where, reason, text[: self._excerpt_chars]))
            if len(self._heap) > self._limit:
                heapq.heappop(self._heap)

    def state(self) -> list[list]:
        return [list(item) for item in self._heap]

    def restore(self, state: list[list]) -> None:
        self._heap = [tuple(item) for item in state]
        heapq.heapify(self._heap)

    def report(self) -> list[dict[str, str]]:
        return [{"where": where, "reason": reason, "text": text} for _, where, reason, text in sorted(self._heap)]


class Cleaner:
    """Runs filters over batches of documents and counts each; one instance per run, not thread-safe."""

    def __init__(self, filters: Sequence[Filter], samples: int = 0):
        """samples: how many of the texts that each filter drops are kept for the report."""
        self._filters = list(filters)
        names = [name for one in self._filters for name in one.names]
        self.counts = {name: FilterCount() for name in names}
        self._samples = {name: Samples(samples) for name in names}

    def clean(self, texts: list[str], where: Sequence[str] = ()) -> tuple[list[str], list[int]]:
        """Return (the texts that are left, cleaned; the index that each had). where: of each text, for the samples."""
        kept = list(range(len(texts)))
        for one in self._filters:
            results = one(texts)
            self._count(one, texts, results, [where[i] for i in kept] if where else [""] * len(kept))
            kept = [i for i, after in zip(kept, results, strict=True) if isinstance(after, str)]
            texts = [after for after in results if isinstance(after, str)]
        return texts, kept

    def _count(self, one: Filter, texts: list[str], results: list[str | Dropped], where: list[str]) -> None:
        for before, after, place in zip(texts, results, where, strict=True):
            for name in one.names:
                if isinstance(after, Dropped) and after.rule == name:
                    self.counts[name].add(before, None)
                    self._samples[name].add(before, place, after.reason)
                    break
                self.counts[name].add(before, before if isinstance(after, Dropped) else after)

    def report(self) -> dict[str, dict[str, int]]:
        """Return the counts by filter, in the order the filters run."""
        return {name: asdict(count) for name, count in self.counts.items()}

    def samples(self) -> dict[str, list[dict[str, str]]]:
        """Return what was kept of the texts that each filter dropped: where, reason, beginning of the text."""
        return {name: found for name, samples in self._samples.items() if (found := samples.report())}

    def state(self) -> dict:
        """What `restore` goes on from, as JSON can hold it."""
        return {"counts": self.report(), "samples": {name: one.state() for name, one in self._samples.items()}}

    def restore(self, state: dict) -> None:
        self.counts = {name: FilterCount(**state["counts"][name]) for name in self.counts}
        for name, one in self._samples.items():
            one.restore(state["samples"][name])
