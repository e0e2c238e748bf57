"""Filters and their counts."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptdist.data.clean import Cleaner, SeenDigests, long_enough, normalize_nfc, remove_control, text_digest


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\n\td", "a\nb\nc\n\td"),
        ("a\x00b\x1bc\x7f", "abc"),
        ("é\x85\x00\ufeffü\ud800", "éü"),
        ("plain", "plain"),
        ("", ""),
    ],
)
def test_remove_control(text, expected):
    assert remove_control(text) == expected


@given(st.text(alphabet=st.characters(codec=None)))
def test_cleaned_text_has_no_controls_and_stays_the_same(text):
    cleaned = normalize_nfc(remove_control(text))
    assert cleaned == normalize_nfc(remove_control(cleaned))
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in cleaned)


def test_long_enough_does_not_count_outer_whitespace():
    assert long_enough("  ab \n", 2)
    assert not long_enough("  a   \n", 2)


def test_counts(tmp_path):
    cleaner = Cleaner(normalize=True, min_chars=3, seen=SeenDigests(tmp_path))
    texts = ["abc\x00", "abc", "e\u0301tude", "\u00e9tude", "x", "other"]
    kept = [cleaned[0] for text in texts if (cleaned := cleaner.clean(text))]
    assert kept == ["abc", "\u00e9tude", "other"]
    counts = {name: (count.documents_in, count.documents_out) for name, count in cleaner.counts.items()}
    assert counts == {"control": (6, 6), "nfc": (6, 6), "min_chars": (6, 5), "duplicates": (5, 3)}
    assert cleaner.counts["control"].characters_in - cleaner.counts["control"].characters_out == 1
    assert cleaner.counts["nfc"].characters_in - cleaner.counts["nfc"].characters_out == 1
    assert cleaner.report()["duplicates"]["characters_out"] == sum(map(len, kept))


def test_filters_can_be_off():
    cleaner = Cleaner(normalize=False, min_chars=0, seen=None)
    assert cleaner.clean("e\u0301")[0] == "e\u0301"
    assert cleaner.clean("e\u0301") is not None
    assert list(cleaner.report()) == ["control", "min_chars"]


@pytest.mark.parametrize("limit", [0, 1, 10, 1000])
def test_digests_are_the_same_in_memory_and_on_disk(tmp_path, limit):
    seen = SeenDigests(tmp_path, max_in_memory=limit)
    digests = [text_digest(str(i % 70)) for i in range(200)]
    assert [seen.add(digest) for digest in digests] == [True] * 70 + [False] * 130
    assert (tmp_path / "seen-digests.sqlite").exists() == (limit < 70)
    seen.close()
    assert not any(tmp_path.iterdir())
