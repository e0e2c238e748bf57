"""Quality rules: a measure of a text each, with a smallest or largest value; a text that fails one is dropped.

The rules and their default limits are those of

    gopher  Rae et al., "Scaling Language Models: Methods, Analysis & Insights from Training Gopher" (2021), appendix A1
    c4      Raffel et al., "Exploring the Limits of Transfer Learning" (JMLR 2020), section 2.2: the page-level ones
    lines   Chen et al., "Evaluating Large Language Models Trained on Code" (2021), section 3.1: line lengths; and the
            share of lines with final punctuation of Penedo et al., "FineWeb" (2024)

A rule's name ends in `_min` or `_max`. Words are what white space separates; shares of characters count those of words.
Of a text beyond 1 MB of UTF-8 the rules see the beginning.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import numpy as np

from gptdist.data.clean import Dropped
from gptdist.data.order import mix64
from gptdist.data.words import GROUP_BYTES, MAX_BYTES, SPACED, Words, extended, find_words
from gptdist.errors import UserError

GOPHER = {
    "words_min": 50.0, "words_max": 100_000.0, "word_length_min": 3.0, "word_length_max": 10.0, "symbols_max": 0.1,
    "bullet_lines_max": 0.9, "ellipsis_lines_max": 0.3, "letter_words_min": 0.8, "stop_words_min": 2.0,
    "duplicate_lines_max": 0.3, "duplicate_line_chars_max": 0.2,
    "duplicate_paragraphs_max": 0.3, "duplicate_paragraph_chars_max": 0.2,
    "top_2_gram_max": 0.2, "top_3_gram_max": 0.18, "top_4_gram_max": 0.16,
    "repeated_5_grams_max": 0.15, "repeated_6_grams_max": 0.14, "repeated_7_grams_max": 0.13,
    "repeated_8_grams_max": 0.12, "repeated_9_grams_max": 0.11, "repeated_10_grams_max": 0.10,
}  # fmt: skip
C4 = {"sentences_min": 3.0, "lorem_ipsum_max": 0.0, "curly_brackets_max": 0.0}
LINES = {"line_length_max": 1000.0, "mean_line_length_max": 100.0, "punctuated_lines_min": 0.12}
GROUPS = {"gopher": GOPHER, "c4": C4, "lines": LINES}
RULES = GOPHER | C4 | LINES

_STOP_WORDS = (b"the", b"be", b"to", b"of", b"and", b"that", b"have", b"with")
_BULLETS = ("•", "‣", "◦", "-", "*")
_CJK_FINAL = "\u3002\uff01\uff1f"  # full stop, exclamation and question mark of full width
_SENTENCE_END = re.compile(rf"[.!?{_CJK_FINAL}][\"'\u201d\u2019)\]]*(?=\s|$)")
_FINAL = (".", "!", "?", '"', "\u201d", *_CJK_FINAL)


def parse_rules(words: Iterable[str]) -> dict[str, float]:
    """The limits that a list means: groups, rules (`words_min`), limits (`words_min=20`), `words_min=off`; later ones
    win.

    Raises UserError for a name that is neither group nor rule, and a limit that is no number.
    """
    limits: dict[str, float] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name in GROUPS and not equals:
            limits |= GROUPS[name]
        elif name not in RULES:
            raise UserError(f"--rules has {word!r}, expected a group ({', '.join(GROUPS)}), a rule, RULE=LIMIT or "
                            f"RULE=off; rules: {', '.join(RULES)}")
        elif value == "off":
            limits.pop(name, None)
        else:
            limits[name] = _limit(word, value) if equals else RULES[name]
    return limits


def _limit(word: str, value: str) -> float:
    try:
        limit = float(value)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise UserError(f"--rules has {word!r}, expected a limit of at least 0, or off")
    return limit


class QualityRules:
    """The filter of a set of limits."""

    def __init__(self, limits: dict[str, float]):
        """limits: as `parse_rules` gives; the rules are looked at in the order of RULES."""
        self._limits = {name: limits[name] for name in RULES if name in limits}
        self.names = tuple(self._limits)

    def __call__(self, texts: list[str]) -> list[str | Dropped]:
        results: list[str | Dropped] = []
        for group in _grouped(texts):
            measures = [_MEASURES[name](group) for name in self.names]  # of each rule: (texts,)
            for i, text in enumerate(group.texts):
                results.append(self._judge(text, [float(values[i]) for values in measures]))
        return results

    def _judge(self, text: str, values: list[float]) -> str | Dropped:
        for (name, limit), value in zip(self._limits.items(), values, strict=True):
            if (value < limit) if name.endswith("_min") else (value > limit):
                return Dropped(name, f"{value:.4g} {'<' if name.endswith('_min') else '>'} {limit:g}")
        return text


class _Group:
    """Texts that are measured together, and what several measures need."""

    def __init__(self, texts: list[str], raw: list[bytes]):
        self.texts = texts
        self.words: Words = find_words(raw, SPACED)
        self.n_words = np.diff(self.words.first)
        self.chars = self.total(self.words.chars)
        # Of the runs of n words that occur more than once in their text: hash, first word, how often. All for n = 1.
        keys = self.words.hashes + mix64(self.words.text.astype(np.uint64))
        self._repeats = [(keys, np.arange(len(keys)), np.ones(len(keys), np.int64))]

    def repeats(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(first word, (k,); number of occurrences, (k,)) of the n-grams that occur more than once in their text.

        A longer one begins where a shorter one repeats, so each n looks only where the one before found something.
        """
        for size in range(len(self._repeats), n):
            keys, first, _ = self._repeats[-1]
            fits = np.flatnonzero(first + size < len(self.words.hashes))
            fits = fits[self.words.text[first[fits]] == self.words.text[first[fits] + size]]
            first = first[fits]
            keys = extended(keys[fits], self.words.hashes[first + size])
            where, count = _repeated(mix64(keys))
            self._repeats.append((keys[where], first[where], count))
        return self._repeats[n - 1][1:]

    @cached_property
    def lines(self) -> list[list[str]]:
        return [[line for line in text.split("\n") if line and not line.isspace()] for text in self.texts]

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sums over the words of each text."""
        return np.bincount(self.words.text, weights=values, minlength=len(self.texts))


def _grouped(texts: list[str]) -> Iterator[_Group]:
    """Cut a batch into groups of about GROUP_BYTES."""
    chosen, raw, size = [], [], 0
    for text in texts:
        data = text.encode()[:MAX_BYTES - 1]
        if chosen and size + len(data) > GROUP_BYTES:
            yield _Group(chosen, raw)
            chosen, raw, size = [], [], 0
        chosen.append(text)
        raw.append(data)
        size += len(data) + 1
    if chosen:
        yield _Group(chosen, raw)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.maximum(whole, 1)


def _stop_words(group: _Group) -> np.ndarray:
    """How many of the eight stop words each text has."""
    stops = find_words(list(_STOP_WORDS), SPACED).hashes
    return sum((group.total(group.words.hashes == stop) > 0).astype(np.int64) for stop in stops)


def _top_n_gram(n: int) -> Callable[[_Group], np.ndarray]:
    """Largest share of characters that one n-gram, occurring at least twice, has."""

    def measure(group: _Group) -> np.ndarray:
        first, count = group.repeats(n)
        largest = np.zeros(len(group.texts))
        np.maximum.at(largest, group.words.text[first], _span_chars(group.words, first, n) * count)
        return np.minimum(_share(largest, group.chars), 1.0)

    return measure


def _repeated_n_grams(n: int) -> Callable[[_Group], np.ndarray]:
    """Share of characters in words that are in an n-gram that occurs at least twice, each counted once."""

    def measure(group: _Group) -> np.ndarray:
        first, _ = group.repeats(n)
        covered = np.zeros(len(group.words.hashes), bool)
        for i in range(n):
            covered[first + i] = True
        return _share(group.total(group.words.chars * covered), group.chars)

    return measure


def _repeated(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(where the values are that occur more than once, (k,); how often each occurs, (k,))."""
    order = np.argsort(keys)
    ordered = keys[order]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(keys) else order
    counts = np.diff(np.append(begins, len(keys)))
    each = np.repeat(counts, counts)
    return order[each > 1], each[each > 1]


def _span_chars(words: Words, first: np.ndarray, n: int) -> np.ndarray:
    return sum((words.chars[first + i] for i in range(n)), np.zeros(len(first), np.int64))


def _of_lines(measure: Callable[[list[str]], float]) -> Callable[[_Group], list[float]]:
    return lambda group: [measure(lines) if lines else 0.0 for lines in group.lines]


def _of_paragraphs(measure: Callable[[list[str]], float]) -> Callable[[_Group], list[float]]:
    def of_text(text: str) -> float:
        parts = [part.strip() for part in text.split("\n\n")]
        return measure([part for part in parts if part])

    return lambda group: [of_text(text) for text in group.texts]


def _duplicates(parts: list[str]) -> float:
    return 1 - len(set(parts)) / len(parts) if parts else 0.0


def _duplicate_chars(parts: list[str]) -> float:
    total = sum(map(len, parts))
    return sum(len(part) * (n - 1) for part, n in Counter(parts).items()) / total if total else 0.0


def _line_share(test: Callable[[str], bool]) -> Callable[[_Group], list[float]]:
    return _of_lines(lambda lines: sum(map(test, lines)) / len(lines))


def _in_text(measure: Callable[[str], float]) -> Callable[[_Group], list[float]]:
    return lambda group: [measure(text) for text in group.texts]


_MEASURES: dict[str, Callable[[_Group], np.ndarray | list[float]]] = {
    "words_min": lambda group: group.n_words,
    "words_max": lambda group: group.n_words,
    "word_length_min": lambda group: _share(group.chars, group.n_words),
    "word_length_max": lambda group: _share(group.chars, group.n_words),
    "symbols_max": lambda group: _share(
        np.array([text.count("#") + text.count("...") + text.count("…") for text in group.texts]), group.n_words),
    "bullet_lines_max": _line_share(lambda line: line.lstrip().startswith(_BULLETS)),
    "ellipsis_lines_max": _line_share(lambda line: line.rstrip().endswith(("...", "…"))),
    "letter_words_min": lambda group: _share(group.total(group.words.has_letter), group.n_words),
    "stop_words_min": _stop_words,
    "duplicate_lines_max": _of_lines(_duplicates),
    "duplicate_line_chars_max": _of_lines(_duplicate_chars),
    "duplicate_paragraphs_max": _of_paragraphs(_duplicates),
    "duplicate_paragraph_chars_max": _of_paragraphs(_duplicate_chars),
    **{f"top_{n}_gram_max": _top_n_gram(n) for n in (2, 3, 4)},
    **{f"repeated_{n}_grams_max": _repeated_n_grams(n) for n in range(5, 11)},
    "sentences_min": _in_text(lambda text: sum(1 for _ in _SENTENCE_END.finditer(text))),
    "lorem_ipsum_max": _in_text(lambda text: "lorem ipsum" in text.lower()),
    "curly_brackets_max": _in_text(lambda text: "{" in text),
    "line_length_max": _of_lines(lambda lines: max(map(len, lines))),
    "mean_line_length_max": _of_lines(lambda lines: sum(map(len, lines)) / len(lines)),
    "punctuated_lines_min": _line_share(lambda line: line.rstrip().endswith(_FINAL)),
}
