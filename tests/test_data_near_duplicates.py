"""Near-duplicates: likeness as defined, bands that find it, the same result for any batches, table and restart."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.data import near_duplicates
from gptdist.data.clean import Dropped
from gptdist.data.near_duplicates import BandTable, MinHash, NearDuplicates, choose_bands, estimate
from gptdist.data.words import MAX_BYTES


def text_of(rng, n):
    return [f"w{rng.randrange(5000)}" for _ in range(n)]


def changed(rng, words, n):
    words = list(words)
    for _ in range(n):
        words[rng.randrange(len(words))] = f"new{rng.randrange(10**6)}"
    return words


def jaccard(first, second):
    one, two = ({tuple(words[i:i + 5]) for i in range(len(words) - 4)} for words in (first, second))
    return len(one & two) / len(one | two)


def corpus(seed=0, n=150):
    """Texts of which many are near copies of earlier ones."""
    rng = random.Random(seed)
    texts = [text_of(rng, 120)]
    for _ in range(n - 1):
        old = rng.choice(texts)
        texts.append(changed(rng, old, rng.choice([0, 1, 8])) if rng.random() < 0.5 else text_of(rng, 120))
    return [" ".join(words) for words in texts]


def filtered(folder, texts, batch=50, threshold=0.8, **kwargs):
    near = NearDuplicates(folder, threshold, **kwargs)
    results = [result for i in range(0, len(texts), batch) for result in near(texts[i:i + batch])]
    report = near.report()
    near.close()
    assert not any(folder.iterdir())
    return results, report


def test_estimated_likeness_is_that_of_the_sets():
    rng = random.Random(1)
    pairs = [(words := text_of(rng, 300), changed(rng, words, rng.choice([0, 2, 5, 10, 30]))) for _ in range(60)]
    signatures = MinHash(0).signatures([" ".join(words) for pair in pairs for words in pair]).astype(np.uint8)
    errors = [estimate(signatures[2 * i], signatures[2 * i + 1]) - jaccard(*pair) for i, pair in enumerate(pairs)]
    assert abs(np.mean(errors)) < 0.015  # standard error 0.005
    assert np.std(errors) < 0.05  # sqrt(J (1 - J) / 128) is at most 0.044


def test_copies_go_and_others_stay(tmp_path):
    rng = random.Random(2)
    originals = [text_of(rng, 200) for _ in range(40)]
    copies = [changed(rng, words, 1) for words in originals]  # likeness about 0.95
    others = [changed(rng, words, 60) for words in originals]  # about 0.13
    texts = [" ".join(words) for words in originals + copies + others]
    results, report = filtered(tmp_path, texts)
    assert results[:40] == texts[:40]
    assert all(isinstance(result, Dropped) for result in results[40:80])
    assert results[80:] == texts[80:]
    assert [result.reason.split()[-1] for result in results[40:80]] == [str(i + 1) for i in range(40)]
    assert report["hits"] == 40
    assert report["kept"] == 80
    assert report["compared"] >= 40


def test_case_and_punctuation_do_not_count_but_words_do(tmp_path):
    texts = ["One two, three four. Five!", "one two three four five", "one two three four six", "One", "one", "", "  "]
    results, _ = filtered(tmp_path, texts)
    assert [isinstance(result, Dropped) for result in results] == [False, True, False, False, True, False, False]


def test_result_does_not_depend_on_batches_or_on_where_the_table_is(tmp_path, monkeypatch):
    texts = corpus()
    expected, report = filtered(tmp_path, texts)
    assert 20 < report["hits"] < 100
    monkeypatch.setattr(near_duplicates, "_FIRST_SLOTS", 64)  # so that it grows many times
    for batch, memory_bytes in ((1, 1 << 30), (7, 0), (150, 4096)):
        results, other = filtered(tmp_path, texts, batch=batch, memory_bytes=memory_bytes)
        assert results == expected
        assert other["hits"] == report["hits"]
        assert other["table_in_memory"] == (memory_bytes >= 1 << 30)


def test_goes_on_after_a_restart(tmp_path):
    texts = corpus(seed=3)
    expected, _ = filtered(tmp_path, texts)
    first = NearDuplicates(tmp_path, 0.8)
    done = first(texts[:60])
    state = first.state()
    first(texts[60:100])  # lost with the process
    second = NearDuplicates(tmp_path, 0.8)
    second.restore(state)
    assert done + second(texts[60:]) == expected
    second.close()


def test_a_text_larger_than_a_piece(tmp_path):
    rng = random.Random(4)
    words = text_of(rng, MAX_BYTES // 4)
    texts = [" ".join(words), " ".join(changed(rng, words, 100)), " ".join(text_of(rng, MAX_BYTES // 4))]
    assert len(texts[0]) > MAX_BYTES
    results, _ = filtered(tmp_path, texts)
    assert [isinstance(result, Dropped) for result in results] == [False, True, False]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold):
    bands, rows = choose_bands(threshold)
    assert bands * rows <= near_duplicates.N_HASHES
    assert 1 - (1 - threshold**rows) ** bands >= 0.98


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(1, 30), min_size=3, max_size=3), max_size=30), st.integers(1, 30))
def test_table_is_a_dictionary(tmp_path_factory, rows, batch):
    """Keys as small as these all have one place, so every probe walks."""
    table = BandTable(tmp_path_factory.mktemp("table") / "t", 3, 1 << 20)
    expected = {}
    keys = np.array(rows, np.uint64).reshape(-1, 3)
    for start in range(0, len(rows), batch):
        part = keys[start:start + batch]
        table.insert(part, np.arange(start, start + len(part)))
    for number, row in enumerate(rows):
        for key in row:
            expected.setdefault(key, number)
    found = table.find(np.arange(40, dtype=np.uint64)[None])[0].tolist()
    assert found == [expected.get(key, -1) for key in range(40)]
