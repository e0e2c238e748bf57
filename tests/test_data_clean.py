"""Filters and their counts."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptdist.data.clean import (
    Cleaner,
    Duplicates,
    Each,
    SeenDigests,
    long_enough,
    normalize_nfc,
    remove_control,
    text_digest,
)


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


def cleaner_of(tmp_path, samples=0):
    return Cleaner([
        Each("control", remove_control), Each("nfc", normalize_nfc),
        Each("min_chars", lambda text: text if long_enough(text, 3) else None), Duplicates(SeenDigests(tmp_path)),
    ], samples=samples)


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_counts(tmp_path, batch):
    cleaner = cleaner_of(tmp_path)
    texts = ["abc\x00", "abc", "e\u0301tude", "\u00e9tude", "x", "other"]
    kept = [text for i in range(0, 6, batch) for text in cleaner.clean(texts[i:i + batch])[0]]
    assert kept == ["abc", "\u00e9tude", "other"]
    counts = {name: (count.documents_in, count.documents_out) for name, count in cleaner.counts.items()}
    assert counts == {"control": (6, 6), "nfc": (6, 6), "min_chars": (6, 5), "duplicates": (5, 3)}
    assert cleaner.counts["control"].characters_in - cleaner.counts["control"].characters_out == 1
    assert cleaner.counts["nfc"].characters_in - cleaner.counts["nfc"].characters_out == 1
    assert cleaner.report()["duplicates"]["characters_out"] == sum(map(len, kept))


def test_samples_do_not_depend_on_the_order_and_survive_a_restart(tmp_path):
    texts = [chr(ord("a") + i) for i in range(20)]
    first, second = cleaner_of(tmp_path, samples=3), cleaner_of(tmp_path, samples=3)
    assert first.clean(texts, [f"f:{i}" for i in range(20)]) == ([], [])
    second.clean(texts[:7:-1], [f"f:{i}" for i in range(19, 7, -1)])
    third = cleaner_of(tmp_path, samples=3)
    third.restore(json.loads(json.dumps(second.state())))
    third.clean(texts[7::-1], [f"f:{i}" for i in range(7, -1, -1)])
    assert third.samples() == first.samples()
    assert third.report() == first.report()
    found = first.samples()["min_chars"]
    assert len(found) == 3
    assert all(texts[int(sample["where"][2:])] == sample["text"] for sample in found)


@pytest.mark.parametrize("limit", [0, 1, 10, 1000])
def test_digests_are_the_same_in_memory_and_on_disk(tmp_path, limit):
    seen = SeenDigests(tmp_path, max_in_memory=limit)
    digests = [text_digest(str(i % 70)) for i in range(200)]
    assert [seen.add(digest) for digest in digests] == [True] * 70 + [False] * 130
    assert (tmp_path / "seen-digests.sqlite").exists() == (limit < 70)
    seen.close()
    assert not any(tmp_path.iterdir())
