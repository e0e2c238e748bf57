"""Mixtures: shares, epochs, the same samples at every world size and after every restart; a change of mixture."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist import config as config_module
from gptdist.data.format import TokenDataset
from gptdist.data.loader import PretrainSource
from gptdist.data.mixture import (
    MixtureOrder,
    MixtureSource,
    Phase,
    counts_by_epochs,
    counts_by_weight,
    phases_identity,
)
from gptdist.data.prepare import PrepareConfig, prepare
from gptdist.data.writer import write_dataset
from gptdist.errors import UserError
from gptdist.metrics import read_rows
from gptdist.tasks import pretrain
from tests.test_data_loader import META, T, real_rows
from tests.test_data_prepare import sentences, write_jsonl
from tests.training import TINY, run_tiny

positive = st.floats(0.01, 100)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Three datasets of 40, 25 and 7 windows whose tokens say where they are from."""
    found = []
    for number, n in enumerate((40, 25, 7)):
        path = tmp_path_factory.mktemp("data") / "train"
        with write_dataset(path, **META) as writer:
            writer.add(np.full(n * T + 1, number))
        found.append(TokenDataset.open(path))
    return found


def source(datasets, phases, **kwargs):
    return MixtureSource(datasets, phases, **{"context": T, "sequences_per_step": 12, "micro_batch": 3, "seed": 5,
                                              **kwargs})


@given(st.lists(positive, min_size=1, max_size=6))
def test_composition_is_that_of_the_weights(weights):
    counts = counts_by_weight(weights)
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count / sum(counts) - weight / sum(weights)) <= 1 / sum(counts)
    assert counts_by_weight([7, 3]) == (70, 30)
    assert counts_by_weight([1, 0]) == (100, 0)


def test_a_share_that_never_comes_is_an_error():
    with pytest.raises(UserError, match="below 1 / 60000"):
        counts_by_weight([1e-6, 1])


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_every_source_counts_its_samples_through_all_phases(data):
    n_sources = data.draw(st.integers(1, 3))
    composition = st.lists(st.integers(0, 9), min_size=n_sources, max_size=n_sources).filter(any).map(tuple)
    starts = sorted({0, *data.draw(st.lists(st.integers(1, 90), max_size=3))})
    phases = [Phase(start, data.draw(composition)) for start in starts]
    order = MixtureOrder(phases, seed=data.draw(st.integers(0, 5)))
    expected = [0] * n_sources
    for number in range(120):
        assert order.counts(number).tolist() == expected
        source_number, own = order.locate(number)
        assert own == expected[source_number]
        expected[source_number] += 1
        for phase, following in zip(phases, [*phases[1:], Phase(10**6, ())], strict=True):  # whole blocks are exact
            done = number + 1 - phase.start
            if phase.start <= number < following.start and done % phase.block == 0:
                assert (order.counts(number + 1) - order.counts(phase.start)).tolist() == [
                    count * done // phase.block for count in phase.counts]


def test_one_source_alone_has_the_order_of_a_plain_run(datasets):
    plain = PretrainSource(datasets[0], context=T, sequences_per_step=12, micro_batch=3, seed=5)
    mixed = source(datasets, [Phase(0, counts_by_weight([1, 0, 0])), Phase(60, (1, 1, 1))])
    for step in range(5):
        assert mixed.step(step, step * 12).data_hash == plain.step(step, step * 12).data_hash
    assert mixed.step(5, 60).data_hash != plain.step(5, 60).data_hash
    assert phases_identity(mixed.order.phases, ["a", "b", "c"], 60) == "a"
    assert phases_identity(mixed.order.phases, ["a", "b", "c"], 61) != "a"


def test_epochs_are_exact(datasets):
    counts = counts_by_epochs([1, 2, 3], [40, 25, 7])
    mixed = source(datasets, [Phase(0, counts)])
    total = 40 + 50 + 21
    seen = [(dataset.path, index) for dataset, index in mixed._located(np.arange(total))]
    for dataset, n, epochs in zip(datasets, (40, 25, 7), (1, 2, 3), strict=True):
        indices = sorted(index for path, index in seen if path == dataset.path)
        assert indices == sorted(list(range(n)) * epochs)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_a_step_is_the_same_at_every_world_size_and_for_every_start(datasets, world):
    phases = [Phase(0, (3, 2, 0)), Phase(31, (1, 1, 2))]
    reference = source(datasets, phases)
    numbers = reference.advance(reference.advance(0))
    expected = real_rows(reference.step(2, numbers).micro_batches)
    rows = {}
    for rank in range(world):  # new sources that have read nothing before
        batch = source(datasets, phases, rank=rank, world=world).step(2, numbers)
        rows |= real_rows(batch.micro_batches)
    assert rows == expected
    assert {tokens[0] for tokens, _ in expected.values()} == {0, 1, 2}


def test_skipped_samples_are_skipped(datasets):
    phases = [Phase(0, (1, 1, 1))]
    plain, skipping = source(datasets, phases), source(datasets, phases, skipped=[(0, 24)])
    assert real_rows(skipping.step(0, 0).micro_batches) == real_rows(plain.step(0, 24).micro_batches)


@pytest.mark.parametrize(("mixture", "message"), [
    ("[{path: a, weight: 0}, {path: b, weight: 0}]", "weights of a, b from step 0 on sum to zero"),
    ("[{path: a, weight: -1}]", "weight or epochs of a is -1, expected at least 0"),
    ("[{path: a, weight: x}]", "weight or epochs of a is 'x'"),
    ("[{path: a}]", "expected path, weight or epochs"),
    ("[{path: a, weight: 1, epochs: 2}]", "expected path, weight or epochs"),
    ("[{path: a, weight: 1, form_step: 2}]", "expected path, weight or epochs, and perhaps from_step"),
    ("[{path: a, weight: 1}, {path: a, weight: 2}]", "one of them twice"),
    ("[{path: a, weight: 1}, {path: b, epochs: 2}]", "has weights and epochs"),
    ("[{path: a, epochs: 1}, {path: b, epochs: 2, from_step: 5}]", "has epochs and from_step"),
    ("[{path: a, weight: 1, from_step: 3}]", "begins at a later step"),
    ("[{path: a, weight: 1, from_step: -3}]", "from_step of a is -3"),
])
def test_bad_mixtures_are_named(tmp_path, mixture, message):
    path = tmp_path / "c.yaml"
    path.write_text(f"data:\n  mixture: {mixture}\n")
    with pytest.raises(UserError) as caught:
        config_module.load(str(path))
    assert message in str(caught.value)
    path.write_text("data:\n  path: x\n  mixture: [{path: a, weight: 1}]\n")
    with pytest.raises(UserError, match=r"data\.path=x and data\.mixture are both given"):
        config_module.load(str(path))
    path.write_text("data:\n  validation: [{name: a b, path: a}]\n")
    with pytest.raises(UserError, match=r"data\.validation has"):
        config_module.load(str(path))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    for name, seed, tokenizer in (("one", 0, "bytes"), ("two", 1, "bytes"), ("other", 2, "bpe:300")):
        prepare(PrepareConfig(inputs=[write_jsonl(folder / f"{name}.jsonl", sentences(250, seed))], workers=1,
                              output=str(folder / name), tokenizer=tokenizer))
    return folder


def train(folder, run_dir, *overrides, steps=8):
    return run_tiny("", run_dir, "--schedule.warmup_steps=0", f"--train.steps={steps}", "--eval.every=4", *overrides)


def mixture(folder, *entries):
    names = ("path", "weight", "from_step")
    items = [", ".join(f"{name}: {value}" for name, value in zip(names, (folder / entry[0], *entry[1:]), strict=False))
             for entry in entries]
    return "--data.mixture=[" + ", ".join(f"{{{item}}}" for item in items) + "]"


def test_training_on_a_mixture_resumes_exactly_and_may_change_it_ahead(prepared, tmp_path):
    first = [("one", 0.7), ("two", 0.3)]
    later = [*first, ("one", 0.2, 5), ("two", 0.8, 5)]
    whole = train(prepared, tmp_path / "whole", mixture(prepared, *later))
    train(prepared, tmp_path / "parts", mixture(prepared, *first), "--train.stop_at=4")
    with pytest.raises(UserError, match="was trained on other data than"):  # a change of what was seen
        train(prepared, tmp_path / "parts", mixture(prepared, *later, ("one", 0.5, 2), ("two", 0.5, 2)))
    rows = train(prepared, tmp_path / "parts", mixture(prepared, *later))
    assert [row["data_hash"] for row in rows] == [row["data_hash"] for row in whole]
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    evaluations = [row for row in read_rows(tmp_path / "whole" / "metrics.jsonl") if row["kind"] == "eval"]
    for row in evaluations:
        assert row["val_loss"] == pytest.approx((row["val_loss_one"] + row["val_loss_two"]) / 2)
    assert evaluations[0]["val_loss_one"] != evaluations[0]["val_loss_two"]


def test_the_order_of_the_entries_changes_nothing(prepared, tmp_path):
    entries = [("one", 0.7), ("two", 0.3), ("one", 0.2, 3), ("two", 0.8, 3)]
    whole = train(prepared, tmp_path / "whole", mixture(prepared, *entries), steps=6)
    train(prepared, tmp_path / "parts", mixture(prepared, *entries[:2]), "--train.stop_at=2", steps=6)
    rows = train(prepared, tmp_path / "parts", mixture(prepared, *entries[::-1]), steps=6)
    assert [row["data_hash"] for row in rows] == [row["data_hash"] for row in whole]
    assert len(rows) == 6
    for suffix in ("train", "tokenizer"):
        (tmp_path / "same").mkdir(exist_ok=True)
        (tmp_path / "same" / suffix).symlink_to(prepared / "one" / suffix)
    with pytest.raises(UserError, match=r"one and .*same hold the same tokens: leave one of them out"):
        train(prepared, tmp_path / "c", mixture(prepared, ("one", 1), (tmp_path / "same", 1)))


def test_a_mixture_of_an_earlier_version_is_refused(prepared, tmp_path, monkeypatch):
    """It was dealt out in the order of the entries, which nothing in a checkpoint of that time tells."""
    entries = mixture(prepared, ("one", 0.7), ("two", 0.3))
    with monkeypatch.context() as earlier:
        earlier.setattr(pretrain, "phases_identity", functools.partial(phases_identity, rule=None))
        train(prepared, tmp_path / "run", entries, "--train.stop_at=1")
    with pytest.raises(UserError, match=r"was trained on this mixture by an earlier version, .*checkpoint\.init_from"):
        train(prepared, tmp_path / "run", entries)


def test_a_plain_run_may_turn_into_a_mixture_and_validation_sets_have_names(prepared, tmp_path):
    run_tiny(prepared / "one", tmp_path / "run", "--schedule.warmup_steps=0", "--train.steps=4", "--train.stop_at=2")
    rows = train(prepared, tmp_path / "run", mixture(prepared, ("one", 1), ("two", 1, 3)), "--data.validation="
                 f"[{{name: second, path: {prepared / 'two'}}}]", steps=4)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    last = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "eval"][-1]
    assert last["val_loss"] == last["val_loss_second"]


def test_data_that_does_not_go_together_is_named(prepared, tmp_path):
    with pytest.raises(UserError, match=r"other was prepared with tokenizer \w+, .*one with"):
        train(prepared, tmp_path / "a", mixture(prepared, ("one", 1), ("other", 1)))
    with pytest.raises(UserError, match=r"data\.mixture=.*nowhere does not exist: expected a directory"):
        train(prepared, tmp_path / "a", mixture(prepared, ("one", 1), ("nowhere", 1)))
    with pytest.raises(UserError, match=r"data\.validation=nowhere does not exist: expected a directory"):
        train(prepared, tmp_path / "a", mixture(prepared, ("one", 1)), "--data.validation=[{name: x, path: nowhere}]")
    with write_dataset(prepared / "tiny" / "train", tokenizer_hash=TokenDataset.open(
            prepared / "one" / "train").meta.tokenizer_hash, vocab_size=257, eot=256) as writer:
        writer.add(np.array([1, 256]))
    (prepared / "tiny" / "tokenizer").symlink_to(prepared / "one" / "tokenizer")
    with pytest.raises(UserError, match=r"tiny/train: 2 tokens, expected at least model\.context \+ 1 = 33"):
        train(prepared, tmp_path / "b", mixture(prepared, ("one", 1), ("tiny", 1)))
    assert TINY["model"]["context"] == 32
