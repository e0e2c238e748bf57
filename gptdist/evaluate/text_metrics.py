"""Generated answers against reference answers: exact match and ROUGE-L.

Both compare words: letters and digits in lower case, everything else a border; on English text these are the words of
the rouge-score package without stemming. ROUGE-L: with L the length of the longest common subsequence of words,
P = L / candidate words, R = L / reference words, F1 = 2 P R / (P + R).
Sources: Rajpurkar et al., "SQuAD" (2016); Lin, "ROUGE" (2004), section 3.1.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

# ASCII words as in rouge-score; letters of other scripts count as well, or such answers would have no words at all.
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class TextScores:
    """Means over pairs of texts, 0 to 1."""

    exact_match: float
    rouge_l: float
    n: int


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def exact_match(candidate: str, reference: str) -> bool:
    """Whether two texts have the same words in the same order: case, punctuation and spacing do not count."""
    a, b = words(candidate), words(reference)
    return a == b if a or b else candidate.strip() == reference.strip()


def rouge_l(candidate: str, reference: str) -> float:
    """F1 of the longest common subsequence of words; 0 where either text has none."""
    a, b = words(candidate), words(reference)
    common = longest_common_subsequence(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0  # 2PR/(P+R), simplified


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length, by the textbook recurrence over one row: O(len(a) len(b)) time, O(len(b)) memory."""
    row = [0] * (len(b) + 1)  # row[j]: of a[:i] and b[:j]
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def score_texts(candidates: Sequence[str], references: Sequence[str]) -> TextScores:
    """Means of exact_match and rouge_l over pairs; at least one."""
    pairs = list(zip(candidates, references, strict=True))
    if not pairs:
        raise ValueError("no texts to score")
    return TextScores(sum(exact_match(*pair) for pair in pairs) / len(pairs),
                      sum(rouge_l(*pair) for pair in pairs) / len(pairs), len(pairs))
