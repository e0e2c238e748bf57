"""Words found and hashed, quality rules, scrubbing, languages."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.data.clean import Dropped
from gptdist.data.quality import GOPHER, RULES, QualityRules, parse_rules
from gptdist.data.scrub import Scrub
from gptdist.data.words import PLAIN, SPACED, find_words, n_grams
from gptdist.errors import UserError

PROSE = ("The house of the old captain stands with its back to the sea, and the people of the village have "
         "always said that it will be there long after the last of them has gone. Nobody knows who built it. "
         "In winter the waves come up to the garden wall; in summer children sit on the stones and fish. ")
ascii_texts = st.lists(st.text(alphabet="ab cA1.\n\té日本", max_size=60), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(ascii_texts)
def test_words_are_those_of_split(texts):
    words = find_words([text.encode() for text in texts], SPACED)
    expected = [re.split(r"[ \n\t]+", text.strip(" \n\t")) if text.strip(" \n\t") else [] for text in texts]
    flat = list(itertools.chain(*expected))
    assert np.diff(words.first).tolist() == [len(one) for one in expected]
    assert words.chars.tolist() == [len(word) for word in flat]
    for (i, first), (j, second) in itertools.combinations(enumerate(flat), 2):
        assert (words.hashes[i] == words.hashes[j]) == (first == second)


@settings(deadline=None, max_examples=40)
@given(ascii_texts)
def test_plain_words_fold_case_and_cut_cjk_into_characters(texts):
    words = find_words([text.encode() for text in texts], PLAIN)
    folded = [re.findall(r"[日本]|[a-zA-Z1é]+", re.sub("([日本])", r" \1", text)) for text in texts]
    joined = [re.findall("[日本][a-zA-Z1é]*|[a-zA-Z1é]+", text) for text in texts]  # Latin after CJK stays with it
    assert np.diff(words.first).tolist() == [len(one) for one in joined]
    assert len(list(itertools.chain(*folded))) >= len(words.hashes)
    flat = [word.replace("A", "a") for word in itertools.chain(*joined)]
    for (i, first), (j, second) in itertools.combinations(enumerate(flat), 2):
        assert (words.hashes[i] == words.hashes[j]) == (first == second)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=12), min_size=1, max_size=4), st.integers(1, 5))
def test_n_grams(texts, n):
    words = find_words([" ".join(text).encode() for text in texts], SPACED)
    hashes, first = n_grams(words, n)
    expected = [tuple(text[i:i + n]) for text in texts for i in range(len(text) - n + 1)]
    assert len(hashes) == len(first) == len(expected)
    for (i, one), (j, other) in itertools.combinations(enumerate(expected), 2):
        assert (hashes[i] == hashes[j]) == (one == other)


def repetition(text, n, top):
    """The two measures of repetition, word by word."""
    words = text.split()
    grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    total = max(1, sum(map(len, words)))
    repeated = {gram for gram in grams if grams.count(gram) > 1}
    if top:
        return min(1.0, max((grams.count(gram) * sum(map(len, gram)) for gram in repeated), default=0) / total)
    covered = {i + j for i, gram in enumerate(grams) if gram in repeated for j in range(n)}
    return sum(len(words[i]) for i in covered) / total


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=30).map(" ".join), min_size=1, max_size=4))
def test_repetition_is_that_of_the_definition(texts):
    for n in range(2, 11):
        name = f"top_{n}_gram_max" if n < 5 else f"repeated_{n}_grams_max"
        results = QualityRules({name: 0.0})(texts)
        for text, result in zip(texts, results, strict=True):
            expected = repetition(text, n, top=n < 5)
            assert isinstance(result, Dropped) == (expected > 0)
            if expected:
                assert float(result.reason.split()[0]) == pytest.approx(expected, rel=1e-3)


BAD = {
    "words_min": "too short", "words_max": "word " * 100_001, "word_length_min": "a b of c " * 50,
    "word_length_max": "extraordinarily incomprehensible " * 50, "symbols_max": PROSE + "# " * 20,
    "bullet_lines_max": "\n".join(f"- {line}" for line in PROSE.split(".")),
    "ellipsis_lines_max": "\n".join(f"{line}..." for line in PROSE.split(".")),
    "letter_words_min": PROSE + "12 34 56 " * 40, "stop_words_min": "nothing stops here ever " * 20,
    "duplicate_lines_max": "the same line again\n" * 20, "duplicate_line_chars_max": "a line of one kind\n" * 4 + "b",
    "duplicate_paragraphs_max": "one paragraph\n\n" * 9, "duplicate_paragraph_chars_max": "one paragraph\n\n" * 9,
    "top_2_gram_max": "buy now " * 30, "top_3_gram_max": "buy it now " * 30, "top_4_gram_max": "do buy it now " * 30,
    **{f"repeated_{n}_grams_max": PROSE * 2 for n in range(5, 11)},
    "sentences_min": "no end here", "lorem_ipsum_max": PROSE + "Lorem ipsum dolor", "curly_brackets_max": "a {b}",
    "line_length_max": "x" * 1001, "mean_line_length_max": PROSE, "punctuated_lines_min": "a title\n" * 9,
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_each_rule_drops_what_it_is_for_and_can_be_off(name):
    bad = BAD[name]
    good, dropped = QualityRules({name: RULES[name]})([PROSE if name != "mean_line_length_max" else "short", bad])
    assert isinstance(good, str)
    assert isinstance(dropped, Dropped)
    assert dropped.rule == name
    assert name not in parse_rules(["gopher", "c4", "lines", f"{name}=off"])
    assert QualityRules(parse_rules([name, f"{name}=off"]))([bad]) == [bad]


def test_good_prose_passes_all_of_gopher_and_rules_are_looked_at_in_order():
    rules = QualityRules(parse_rules(["gopher"]))
    assert rules([PROSE]) == [PROSE]
    assert rules.names == tuple(GOPHER)
    assert rules(["short", "", PROSE * 3])[2].rule.startswith("repeated_5")
    assert [result.rule for result in rules(["short", ""])] == ["words_min"] * 2
    assert parse_rules(["gopher", "words_min=7"])["words_min"] == 7


def test_batches_do_not_change_what_is_measured():
    texts = [PROSE * (1 + i % 3) + str(i) for i in range(300)] + ["x y " * 300_000, PROSE]
    rules = QualityRules(parse_rules(["gopher", "c4", "lines"]))
    assert rules(texts) == rules(texts[:100]) + rules(texts[100:102]) + rules(texts[102:])


@pytest.mark.parametrize(("text", "expected"), [
    ("write to jo.doe+x@mail.example.org, please", "write to <EMAIL>, please"),
    ("a@b is no address, nor is @decorator or x@y.", "a@b is no address, nor is @decorator or x@y."),
    ("call +49 30 12345678 or (555) 123-4567 or 555-123-4567.", "call <PHONE> or <PHONE> or <PHONE>."),
    ("pi is 3.14159265358, in 1999-2004, ISBN 978-3-16-148410-0", "pi is 3.14159265358, in 1999-2004, "
                                                                  "ISBN 978-3-16-148410-0"),
    ("hosts 192.168.0.1, 2001:db8::8a2e:370:7334 and ::1", "hosts <IP>, <IP> and <IP>"),
    ("version 1.2.3.4.5, std::vector, a::b, 12:30:45, 300.1.2.3", "version 1.2.3.4.5, std::vector, a::b, 12:30:45, "
                                                                 "300.1.2.3"),
])
def test_scrub(text, expected):
    scrub = Scrub(["email", "phone", "ip"])
    assert scrub([text]) == [expected]
    assert sum(scrub.replaced.values()) == len(re.findall("<[A-Z]+>", expected))
    assert Scrub(["email"])(["call 555-123-4567"]) == ["call 555-123-4567"]


@settings(deadline=None, max_examples=40)
@given(st.text(alphabet="a1@.:+-( )x", max_size=200))
def test_scrub_ends_and_finds_nothing_the_second_time(text):
    scrub = Scrub(["email", "phone", "ip"])
    once = scrub([text])
    scrub.replaced = dict.fromkeys(scrub.replaced, 0)
    assert scrub(once) == once or sum(scrub.replaced.values()) > 0


def test_languages():
    pytest.importorskip("py3langid", reason="py3langid is not installed (extra `data`)")
    from gptdist.data.language import LanguageFilter

    german = "Dies ist ein langer deutscher Satz über das Wetter, den niemand für Englisch halten wird."
    results = LanguageFilter(["en"], 0.5)([PROSE, german])
    assert results[0] == PROSE
    assert results[1].rule == "language"
    assert results[1].reason.startswith("de, probability")
    assert LanguageFilter(["de", "en"], 0.5)([PROSE, german]) == [PROSE, german]
    with pytest.raises(UserError, match="--languages has xx, expected some of"):
        LanguageFilter(["xx"], 0.5)
