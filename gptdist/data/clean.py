"""Text filters, each a small pure function, and the counts of what each let through.

Order: control characters removed, Unicode NFC, minimal length, exact duplicates. Characters are Unicode code points.
"""

import hashlib
import re
import sqlite3
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path

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


class Cleaner:
    """Runs the filters over a stream of documents and counts each; one instance per run, not thread-safe."""

    def __init__(self, *, normalize: bool, min_chars: int, seen: SeenDigests | None):
        """normalize: apply NFC. min_chars: minimal length. seen: drop exact duplicates; None keeps them."""
        self._normalize = normalize
        self._min_chars = min_chars
        self._seen = seen
        names = ["control"] + ["nfc"] * normalize + ["min_chars"] + ["duplicates"] * (seen is not None)
        self.counts = {name: FilterCount() for name in names}

    def clean(self, text: str) -> tuple[str, bytes] | None:
        """Return (cleaned text, its digest), or None if a filter dropped the document."""
        text = self._count("control", text, remove_control(text))
        if self._normalize:
            text = self._count("nfc", text, normalize_nfc(text))
        if self._count("min_chars", text, text if long_enough(text, self._min_chars) else None) is None:
            return None
        digest = text_digest(text)
        if self._seen is not None:
            is_new = self._seen.add(digest)
            if self._count("duplicates", text, text if is_new else None) is None:
                return None
        return text, digest

    def report(self) -> dict[str, dict[str, int]]:
        """Return the counts by filter, in the order the filters run."""
        return {name: asdict(count) for name, count in self.counts.items()}

    def _count(self, name: str, before: str, after: str | None) -> str | None:
        self.counts[name].add(before, after)
        return after
