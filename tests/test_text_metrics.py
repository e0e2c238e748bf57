"""Exact match and ROUGE-L against values worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptdist.evaluate.text_metrics import exact_match, longest_common_subsequence, rouge_l, score_texts, words


@pytest.mark.parametrize(("candidate", "reference", "expected"), [
    # The rouge-score package's own example: words the quick brown dog jumps on the log | the quick brown fox jumps over
    # the lazy dog: the quick brown jumps the = 5 of 8 and of 9 words.
    ("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog", 2 * 5 / (8 + 9)),
    # Lin (2004), section 3.1: S1 "police killed the gunman", S2 "police kill the gunman", S3 "the gunman kill police".
    ("police kill the gunman", "police killed the gunman", 3 / 4),
    ("the gunman kill police", "police killed the gunman", 2 / 4),
    ("a b c", "a b c", 1.0),
    ("a b c", "c b a", 1 / 3),
    ("testing one two", "testing", 2 * 1 / (3 + 1)),
    ("snake_case words", "snake case words", 1.0),
    ("", "a", 0.0),
    ("a", "", 0.0),
    ("...", "!!!", 0.0),
])
def test_rouge_l(candidate, reference, expected):
    assert rouge_l(candidate, reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("candidate", "reference", "same"), [
    ("Return the  name.", "return the name", True),
    ("Return the name", "Return a name", False),
    ("Été", "été", True),
    ("?", "?", True),
    ("?", "!", False),
    ("", "", True),
    ("", "a", False),
])
def test_exact_match(candidate, reference, same):
    assert exact_match(candidate, reference) == same


def test_means():
    scores = score_texts(["a b", "c"], ["a b", "d"])
    assert (scores.exact_match, scores.rouge_l, scores.n) == (0.5, 0.5, 2)
    with pytest.raises(ValueError, match="no texts"):
        score_texts([], [])


def recursive_lcs(a: str, b: str) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + recursive_lcs(a[:-1], b[:-1])
    return max(recursive_lcs(a[:-1], b), recursive_lcs(a, b[:-1]))


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_the_subsequence_equals_its_definition(a, b):
    assert longest_common_subsequence(a, b) == longest_common_subsequence(b, a) == recursive_lcs(a, b)


@given(st.text(), st.text())
def test_scores_are_shares(a, b):
    assert 0.0 <= rouge_l(a, b) <= 1.0
    assert rouge_l(a, a) == (1.0 if words(a) else 0.0)
    assert exact_match(a, a)
