"""A vocabulary that grows when a checkpoint is loaded, in one process; test_instruct.py has two."""

import itertools

import pytest
import torch

from gptdist.checkpoint import store
from gptdist.checkpoint.grow import fill_rows, load_grown
from gptdist.errors import UserError
from gptdist.model import IGNORE
from gptdist.parallel.flat_shard import FlatShard
from tests.test_model import small_model


def saved(tmp_path, **options):
    """(model of 300 tokens in 384 rows, its checkpoint)"""
    model = small_model(vocab_size=300, **options).requires_grad_(False)
    return model, store.save(tmp_path, 1, state(model), {})


def state(model):
    return {f"model.{name}": p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size", [303, 387])  # within the padded rows, and beyond them
def test_old_rows_stay_and_new_ones_are_near_the_mean(tmp_path, tied, vocab_size):
    old, path = saved(tmp_path, tied=tied)
    new = small_model(vocab_size=vocab_size, tied=tied).requires_grad_(False)
    assert load_grown(path, state(new), trained=300, seed=3) == []
    assert new.wte.weight.shape[0] == (384 if vocab_size == 303 else 512)
    for name, p in new.named_parameters():
        was = old.get_parameter(name)
        if "wte" not in name and "head" not in name:
            assert torch.equal(p, was)
            continue
        assert torch.equal(p[:300], was[:300])
        added = p[300:] - was[:300].mean(0)
        assert added.std() == pytest.approx(0.02, rel=0.05)
        assert len(added.unique(dim=0)) == len(added)
    tokens = torch.randint(0, 300, (2, 9))
    targets = torch.randint(0, 300, (2, 9))
    assert torch.allclose(old.hidden(tokens), new.hidden(tokens))
    # The new tokens take about their share of the probability: -log(1 - share).
    assert (new(tokens, targets) - old(tokens, targets)).max() < 2 * (vocab_size - 300) / 300
    assert new(torch.full((1, 2), vocab_size - 1), torch.tensor([[vocab_size - 1, IGNORE]])).isfinite().all()


def test_a_model_of_another_width_is_still_refused(tmp_path):
    _, path = saved(tmp_path)
    other = small_model(vocab_size=500, width=64)
    with pytest.raises(UserError, match=r"the checkpoint has \(48,\), this model wants \(64,\)"):
        load_grown(path, state(other), trained=300, seed=3)
    with pytest.raises(UserError, match=r"the checkpoint has \(384, 48\), this model wants \(512, 48\)"):
        store.load(path, state(small_model(vocab_size=500)))
    fewer = small_model(vocab_size=100)
    with pytest.raises(UserError, match=r"the checkpoint has \(384, 48\), this model wants \(128, 48\)"):
        load_grown(path, state(fewer), trained=300, seed=3)


@pytest.mark.parametrize("first", [0, 2, 5])
def test_rows_of_flat_shards(first):
    """Cut anywhere, the parts together hold what a whole tensor would."""
    rows = torch.arange((6 - first) * 4.0).view(-1, 4) + 100
    whole = torch.zeros(6, 4)
    fill_rows(whole, first, rows)
    for cuts in ([0, 24], [0, 7, 24], [0, 8, 9, 21, 21, 24]):
        flat = torch.zeros(24)
        for start, stop in itertools.pairwise(cuts):
            fill_rows(FlatShard(flat[start:stop], start, (6, 4)), first, rows)
        assert torch.equal(flat.view(6, 4), whole)


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_word_starts_as_the_mean_of_its_parts(tmp_path, tied):
    old, path = saved(tmp_path, tied=tied)
    new = small_model(vocab_size=303, tied=tied).requires_grad_(False)
    load_grown(path, state(new), trained=300, seed=3, parts=[[1, 2, 3], [7]])
    for name in {"wte.weight", *(() if tied else ("head.weight",))}:
        was, now = old.get_parameter(name), new.get_parameter(name)
        assert torch.equal(now[:300], was[:300])
        assert torch.allclose(now[300], was[1:4].mean(0))
        assert torch.equal(now[301], was[7])
        assert not torch.equal(now[302], was[7])
