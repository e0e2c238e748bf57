"""Near-duplicate removal: MinHash signatures, LSH to find candidates, and an estimate of the likeness to decide.

The likeness of two texts is the Jaccard index of their sets of word 5-grams. A signature has the least value of each of
about 128 hash functions over a text's 5-grams: two texts agree in a value with a probability that is their likeness
(Broder 1997). Signatures are cut into bands; texts that agree in a whole band are candidates (Leskovec, Rajaraman and
Ullman, "Mining of Massive Datasets", section 3.4). A candidate counts as a near-duplicate if the likeness estimated
from one byte of each value (Li and Konig, "b-Bit Minwise Hashing", 2010) reaches the threshold. Used so on web text by
Lee et al., "Deduplicating Training Data Makes Language Models Better" (2022).

A text is compared with those kept before it and no others, so the result is a function of the texts' order alone.
Every kept text costs `bands` slots of 8 bytes in a hash table that is at most two thirds full, in memory up to a limit
and in a file beyond it, and on disk its signature's bytes and bands: the cost is linear in the number of texts.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gptdist.data.clean import Dropped
from gptdist.data.order import mix64
from gptdist.data.row_log import RowLog
from gptdist.data.words import GROUP_BYTES, MAX_BYTES, PLAIN, find_words, n_grams

N_HASHES = 128
WORDS = 5  # of a shingle
_RECALL = 0.98  # of pairs exactly as like as the threshold
_SHINGLES_AT_A_TIME = 512  # x N_HASHES x 4 bytes fit the processor's cache
_FIRST_SLOTS = 1 << 16
_FULL = 2 / 3


def choose_bands(threshold: float) -> tuple[int, int]:
    """(bands, rows of each) with bands x rows <= N_HASHES: the most rows for which 1 - (1 - t^rows)^bands >= _RECALL.

    More rows mean fewer candidates to look at, and fewer bands to keep.
    """
    for rows in range(N_HASHES, 1, -1):
        bands = N_HASHES // rows
        if 1 - (1 - threshold**rows) ** bands >= _RECALL:
            fewest = next(n for n in range(1, bands + 1) if 1 - (1 - threshold**rows) ** n >= _RECALL)
            return fewest, rows
    return N_HASHES, 1


class MinHash:
    """Signatures of texts: uint32 (N_HASHES,) each."""

    def __init__(self, seed: int):
        draw = mix64(np.arange(2 * N_HASHES, dtype=np.uint64) + mix64(np.array([seed], np.uint64)))
        self._factors = draw[:N_HASHES].astype(np.uint32) | np.uint32(1)
        self._terms = draw[N_HASHES:].astype(np.uint32)

    def signatures(self, texts: list[str]) -> np.ndarray:
        """(texts, N_HASHES). A text of fewer than WORDS words has one shingle, all of it; one without words has none,
        and the largest value everywhere."""
        result = np.full((len(texts), N_HASHES), 0xFFFFFFFF, np.uint32)
        for numbers, pieces in _pieces(texts):
            words = find_words(pieces, PLAIN)
            hashes, first = n_grams(words, WORDS)
            of_text = words.text[first]
            few = np.diff(words.first)
            for i in np.flatnonzero((few > 0) & (few < WORDS)).tolist():
                whole = np.bitwise_xor.reduce(mix64(words.hashes[words.first[i]:words.first[i + 1]]
                                                    + np.arange(few[i], dtype=np.uint64)))
                self._take(result[numbers[i]], whole.reshape(1))
            bounds = np.searchsorted(of_text, np.arange(len(pieces) + 1))
            for i, number in enumerate(numbers):
                self._take(result[number], hashes[bounds[i]:bounds[i + 1]])
        return result

    def _take(self, signature: np.ndarray, shingles: np.ndarray) -> None:
        """Lower the values of one signature to those of further shingles, uint64 (n,)."""
        short = (shingles >> np.uint64(32)).astype(np.uint32)[:, None]  # (n, 1)
        for start in range(0, len(short), _SHINGLES_AT_A_TIME):
            values = short[start:start + _SHINGLES_AT_A_TIME] * self._factors  # (n, N_HASHES)
            values += self._terms
            np.minimum(signature, values.min(axis=0), out=signature)


def _pieces(texts: list[str]) -> Iterator[tuple[list[int], list[bytes]]]:
    """(numbers of texts, their UTF-8), about GROUP_BYTES at a time; a larger text comes in several pieces."""
    numbers, pieces, size = [], [], 0
    for number, text in enumerate(texts):
        data = text.encode()
        for start in range(0, len(data), MAX_BYTES - 1):
            piece = data[start:start + MAX_BYTES - 1]
            if pieces and size + len(piece) > GROUP_BYTES:
                yield numbers, pieces
                numbers, pieces, size = [], [], 0
            numbers.append(number)
            pieces.append(piece)
            size += len(piece) + 1
    if pieces:
        yield numbers, pieces


class NearDuplicates:
    """The filter. Its files are in `directory`; `close` removes them."""

    names = ("near_duplicates",)

    def __init__(self, directory: Path, threshold: float, *, seed: int = 0, memory_bytes: int = 1 << 30):
        """threshold: likeness in (0, 1] from which a text is dropped. memory_bytes: of the table in memory."""
        self.threshold = threshold
        self.bands, self.rows = choose_bands(threshold)
        self.compared = self.hits = 0
        self.n_kept = 0
        self._seed = seed
        self._minhash = MinHash(seed)
        self._table = BandTable(directory / "bands.table", self.bands, memory_bytes)
        self._bands = RowLog(directory / "bands.log", "<u8", self.bands)
        self._bytes = RowLog(directory / "signatures.log", "u1", N_HASHES)

    def __call__(self, texts: list[str]) -> list[str | Dropped]:
        signatures = self._minhash.signatures(texts)
        keys = self._keys(signatures)
        small = signatures.astype(np.uint8)
        has_words = (signatures != 0xFFFFFFFF).any(axis=1)
        known = self._table.find(keys)  # (texts, bands): the kept text that has this band, or -1
        recent: dict[int, int] = {}  # the same of the texts kept in this batch
        new_rows: list[int] = []
        results: list[str | Dropped] = []
        for i, text in enumerate(texts):
            row_keys = keys[i].tolist()
            others = {found for found in known[i].tolist() if found >= 0}
            others.update(recent[key] for key in row_keys if key in recent)
            match = self._best(small, i, sorted(others), new_rows) if has_words[i] else None
            if match is not None:
                results.append(Dropped("near_duplicates", f"likeness {match[0]:.2f} to kept text {match[1] + 1}"))
                self.hits += 1
                continue
            results.append(text)
            number = self.n_kept + len(new_rows)
            new_rows.append(i)
            if has_words[i]:
                for key, found in zip(row_keys, known[i].tolist(), strict=True):
                    if found < 0:
                        recent.setdefault(key, number)
        self._bands.append(np.where(has_words[new_rows, None], keys[new_rows], np.uint64(0)))
        self._bytes.append(small[new_rows])
        self._add(keys[new_rows], has_words[new_rows])
        return results

    def _best(self, small: np.ndarray, i: int, others: list[int], new_rows: list[int]) -> tuple[float, int] | None:
        """(likeness, number) of the kept text that is most like text `i` of the batch, if it reaches the threshold."""
        best = None
        for number in others:
            self.compared += 1
            recent = number - self.n_kept
            theirs = small[new_rows[recent]] if recent >= 0 else self._bytes.read(number, number + 1)[0]
            likeness = estimate(small[i], theirs)
            if likeness >= self.threshold and (best is None or likeness > best[0]):
                best = likeness, number
        return best

    def _add(self, keys: np.ndarray, has_words: np.ndarray) -> None:
        """Put the bands of further kept texts, uint64 (n, bands), into the table."""
        numbers = np.arange(self.n_kept, self.n_kept + len(keys))
        self.n_kept += len(keys)
        if self.n_kept * self.bands > _FULL * self._table.n_slots:
            self._fill_table()
            return
        self._table.insert(np.where(has_words[:, None], keys, np.uint64(0)), numbers)

    def _fill_table(self) -> None:
        """A new table, of the size that it needs now, from the log of bands."""
        self._table.grow(self.n_kept * self.bands)
        for start in range(0, self.n_kept, 1 << 16):
            rows = self._bands.read(start, min(self.n_kept, start + (1 << 16)))
            self._table.insert(rows, np.arange(start, start + len(rows)))

    def _keys(self, signatures: np.ndarray) -> np.ndarray:
        """uint64 (texts, bands): a hash of each band and its number, never 0."""
        parts = signatures[:, :self.bands * self.rows].astype(np.uint64).reshape(len(signatures), self.bands, self.rows)
        keys = np.broadcast_to(np.arange(self.bands, dtype=np.uint64), parts.shape[:2])
        for row in range(self.rows):
            keys = mix64(keys ^ parts[:, :, row])
        return np.maximum(keys, np.uint64(1))

    def report(self) -> dict:
        return {
            "threshold": self.threshold, "shingle_words": WORDS, "hashes": N_HASHES, "bands": self.bands,
            "rows": self.rows, "seed": self._seed, "compared": self.compared, "hits": self.hits, "kept": self.n_kept,
            "table_bytes": self._table.n_slots * 8, "table_in_memory": self._table.in_memory,
            "disk_bytes": self.n_kept * (self.bands * 8 + N_HASHES),
        }  # fmt: skip

    def state(self) -> dict:
        """What `restore` goes on from, together with the logs in the directory, which are on disk afterwards."""
        self._bands.sync()
        self._bytes.sync()
        return {"kept": self.n_kept, "compared": self.compared, "hits": self.hits}

    def restore(self, state: dict) -> None:
        """Go on from a state; what the logs have beyond it is cut off."""
        self.compared, self.hits = state["compared"], state["hits"]
        self._bands.truncate(state["kept"])
        self._bytes.truncate(state["kept"])
        self.n_kept = state["kept"]
        self._fill_table()

    def close(self) -> None:
        for one in (self._table, self._bands, self._bytes):
            one.close()


def estimate(first: np.ndarray, second: np.ndarray) -> float:
    """Likeness of two texts from the low bytes of their signatures, uint8 (N_HASHES,) each."""
    by_chance = 1 / 256
    return max(0.0, (np.count_nonzero(first == second) / len(first) - by_chance) / (1 - by_chance))


class BandTable:
    """Hash table from the bands of texts to the first text that had each: open addressing, linear probing.

    A slot is uint64: the key's low 32 bits and the text's number + 1; 0 is empty. Two keys of equal low bits whose
    places are near are taken for one, which costs a comparison of signatures. Beyond `memory_bytes` the table is a
    file, of which the operating system keeps in memory what there is room for.
    """

    def __init__(self, path: Path, bands: int, memory_bytes: int):
        self._path, self._bands, self._memory_bytes = path, bands, memory_bytes
        self._slots = np.zeros(0, np.uint64)
        self.grow(0)

    @property
    def n_slots(self) -> int:
        return len(self._slots)

    @property
    def in_memory(self) -> bool:
        return not isinstance(self._slots, np.memmap)

    def grow(self, n_keys: int) -> None:
        """Begin anew, empty, with room for `n_keys` and up to as many again."""
        n_slots = max(_FIRST_SLOTS, 1 << int(n_keys / _FULL).bit_length())
        self._slots = np.zeros(0, np.uint64)  # give the old memory back first
        if n_slots * 8 <= self._memory_bytes:
            self._slots = np.zeros(n_slots, np.uint64)
            return
        self._path.unlink(missing_ok=True)
        self._slots = np.memmap(self._path, np.uint64, "w+", shape=(n_slots,))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The number stored with each key, int64 of the shape of `keys`; -1: not there."""
        flat = keys.ravel()
        found = np.full(flat.shape, -1, np.int64)
        tags, place = flat & np.uint64(0xFFFFFFFF), self._place(flat)
        left = np.arange(len(flat))
        while len(left):
            slots = self._slots[place[left]]
            hit = (slots != 0) & (slots & np.uint64(0xFFFFFFFF) == tags[left])
            found[left[hit]] = (slots[hit] >> np.uint64(32)).astype(np.int64) - 1
            left = left[(slots != 0) & ~hit]
            place[left] = (place[left] + 1) & (self.n_slots - 1)
        return found.reshape(keys.shape)

    def insert(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        """Store numbers, (n,) ascending, for the keys, uint64 (n, bands), that are not there. Key 0 is left out."""
        flat, owner = keys.ravel(), np.repeat(numbers, keys.shape[1])
        flat, first = np.unique(flat, return_index=True)  # the first text that has a key keeps it
        flat, owner = flat[flat != 0], owner[first][flat != 0]
        tags, place = flat & np.uint64(0xFFFFFFFF), self._place(flat)
        values = ((owner + 1).astype(np.uint64) << np.uint64(32)) | tags
        left = np.arange(len(flat))
        while len(left):
            slots = self._slots[place[left]]
            empty = left[slots == 0]
            self._slots[place[empty]] = values[empty]
            won = self._slots[place[left]]  # of several that wrote to one place, one did
            left = left[(won != values[left]) & (won & np.uint64(0xFFFFFFFF) != tags[left])]
            place[left] = (place[left] + 1) & (self.n_slots - 1)

    def _place(self, keys: np.ndarray) -> np.ndarray:
        return (keys >> np.uint64(65 - self.n_slots.bit_length())).astype(np.int64)

    def close(self) -> None:
        self._slots = np.zeros(0, np.uint64)
        self._path.unlink(missing_ok=True)
