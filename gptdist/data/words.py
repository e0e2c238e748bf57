"""The words of texts as 64-bit hashes, found and hashed with NumPy: a few passes over the bytes, no loop over words.

A word's hash is the sum over its bytes b_0 b_1 ... of R[b_j] P^j modulo 2^64, mixed; R is a fixed random table, P odd.
The powers count from the beginning of the batch, and one power of P^-1 for each word takes that back. Equal words have
equal hashes on every machine.
"""

import functools
import string
from dataclasses import dataclass

import numpy as np

from gptdist.data.order import mix64

MAX_BYTES = 1 << 20  # of one call: the arrays take about 40 bytes for each
GROUP_BYTES = 1 << 17  # texts to put in one call: few calls, and arrays that the processor's cache holds
_P = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_P_INVERSE = pow(_P, -1, 1 << 64)

_BYTES = np.arange(256)
_SPACE = np.isin(_BYTES, list(b" \n\t"))
_DIGIT = np.isin(_BYTES, list(b"0123456789"))
_UPPER = np.isin(_BYTES, list(string.ascii_uppercase.encode()))
_LETTER = np.isin(_BYTES, list(string.ascii_letters.encode())) | (_BYTES >= 0x80)
_CONTINUES = (_BYTES >= 0x80) & (_BYTES < 0xC0)  # UTF-8: not the first byte of a character
_CJK_LEAD = (_BYTES >= 0xE3) & (_BYTES <= 0xED)  # U+3000 to U+DFFF: written without spaces


@dataclass(frozen=True)
class WordKind:
    """is_word: bool (256,), which bytes words are made of. by_character: CJK characters are words of their own.
    fold_case: A to Z count as a to z."""

    is_word: np.ndarray
    by_character: bool = False
    fold_case: bool = False

    @functools.cached_property
    def table(self) -> np.ndarray:
        """uint64 (256,): the value of each byte, 0 for what separates words."""
        table = mix64(np.arange(1, 257, dtype=np.uint64))
        if self.fold_case:
            table[_UPPER] = table[np.flatnonzero(_UPPER) + 32]
        return np.where(self.is_word, table, np.uint64(0))


SPACED = WordKind(~_SPACE)  # whatever white space separates, as the quality rules count
PLAIN = WordKind(_LETTER | _DIGIT, by_character=True, fold_case=True)  # letters and digits, for comparing texts


@dataclass(frozen=True)
class Words:
    """The words of a batch of texts, one after another."""

    hashes: np.ndarray  # uint64 (n,)
    chars: np.ndarray  # int64 (n,): characters of each word
    has_letter: np.ndarray  # bool (n,)
    text: np.ndarray  # int64 (n,): which text it is of, ascending
    first: np.ndarray  # int64 (texts + 1,): where the words of each text begin


def find_words(texts: list[bytes], kind: WordKind) -> Words:
    """texts: UTF-8, with the spaces between them at most MAX_BYTES together."""
    data = np.frombuffer(b" ".join(texts) + b" ", np.uint8)
    assert len(data) <= MAX_BYTES + 1, len(data)
    is_word = kind.is_word[data]
    begins = is_word.copy()
    begins[1:] &= ~is_word[:-1]
    if kind.by_character:
        begins |= _CJK_LEAD[data]
    starts = np.flatnonzero(begins)
    powers, inverse = _powers(_P)[:len(data)], _powers(_P_INVERSE)[:len(data)]
    hashes = mix64(_sums(kind.table[data] * powers, starts) * inverse[starts])
    ends = np.cumsum([len(text) + 1 for text in texts], dtype=np.int64)
    text = np.searchsorted(ends, starts, side="right")
    return Words(
        hashes=hashes,
        chars=_sums((is_word & ~_CONTINUES[data]).astype(np.int64), starts),
        has_letter=_sums((is_word & _LETTER[data]).astype(np.int64), starts) > 0,
        text=text,
        first=np.searchsorted(text, np.arange(len(texts) + 1)),
    )


def n_grams(words: Words, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 (m,) hash of each run of n words of one text, int64 (m,) its first word)."""
    m = max(0, len(words.hashes) - n + 1)
    total = words.hashes[:m].copy()
    for i in range(1, n):
        total = extended(total, words.hashes[i : i + m])
    start = np.flatnonzero(words.text[:m] == words.text[n - 1 : n - 1 + m])
    return mix64(total[start]), start


def extended(hashes: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Hashes of runs of words that are one word longer; `by` has the word of each. To be mixed before use."""
    return hashes * np.uint64(_P) + by


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums of `values` from each start to the next."""
    return np.add.reduceat(values, starts) if len(starts) else values[:0]


@functools.cache
def _powers(base: int) -> np.ndarray:
    powers = np.full(MAX_BYTES + 1, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)
