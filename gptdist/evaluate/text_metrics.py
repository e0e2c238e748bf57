"""Generated answers against reference answers: exact match, F1 of words, ROUGE-L, BLEU.

The first three compare words: letters and digits in lower case, everything else a border; on English text these are
the words of the rouge-score package without stemming. With L the number of common words (F1) or the length of the
longest common subsequence of words (ROUGE-L), P = L / candidate words, R = L / reference words, F1 = 2 P R / (P + R).
BLEU is of a whole corpus, with case, over the tokens of WMT's mteval-v13a: what sacrebleu computes by default.
Sources: Rajpurkar et al., "SQuAD" (2016); Lin, "ROUGE" (2004), section 3.1; Papineni et al., "BLEU" (2002); Post, "A
call for clarity in reporting BLEU scores" (2018).
"""

import math
import re
from collections import Counter
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


def token_f1(candidate: str, reference: str) -> float:
    """F1 of the words that both have, each as often as both have it; 1 where exact_match holds."""
    a, b = words(candidate), words(reference)
    if not a or not b:
        return float(exact_match(candidate, reference))
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))


MAX_ORDER = 4  # BLEU's longest n-grams
_ENTITIES = {"<skipped>": "", "-\n": "", "\n": " ", "&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_BORDERS = (  # of mteval-v13a
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),  # ASCII symbols but . , - and '
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),  # . and , stay inside numbers
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def bleu_tokens(text: str) -> list[str]:
    """The tokens of mteval-v13a."""
    for entity, character in _ENTITIES.items():
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, replacement in _BORDERS:
        text = pattern.sub(replacement, text)
    return text.split()


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, 0 to 100: the geometric mean of the precisions of 1- to 4-grams, times exp(1 - r/c) if c < r.

    references: one or more for each candidate. c, r: tokens of the candidates, and of the reference nearest in length
    to each. Orders without a match count 1/2, 1/4, ... matches, as mteval and sacrebleu smooth; one that no candidate
    is long enough for makes the score 0.
    """
    hits, totals, c, r = [0] * MAX_ORDER, [0] * MAX_ORDER, 0, 0
    for candidate, texts in zip(candidates, references, strict=True):
        tokens, others = bleu_tokens(candidate), [bleu_tokens(text) for text in texts]
        c += len(tokens)
        r += min((abs(len(other) - len(tokens)), len(other)) for other in others)[1]
        for n in range(1, MAX_ORDER + 1):
            most = Counter()
            for other in others:
                most |= _ngrams(other, n)
            hits[n - 1] += (_ngrams(tokens, n) & most).total()
            totals[n - 1] += max(0, len(tokens) - n + 1)
    if not all(totals) or not any(hits):
        return 0.0
    halves, logs = 1.0, 0.0
    for hit, total in zip(hits, totals, strict=True):
        halves = halves if hit else halves / 2
        logs += math.log((hit or halves) / total)
    return 100 * math.exp(logs / MAX_ORDER + min(0.0, 1 - r / c))


def _ngrams(tokens: Sequence[str], n: int) -> Counter:
    return Counter(tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1))


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
