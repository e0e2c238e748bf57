import math

import numpy as np
import pytest

from gptdist.checkpoint.layout import latest
from gptdist.errors import UserError
from gptdist.evaluate.bigram import bigram_loss
from gptdist.evaluate.perplexity import evaluate_checkpoint
from tests.training import eval_losses, run_tiny


def test_bigram_of_a_known_chain_reaches_its_entropy():
    """A Markov chain whose entropy rate is known: the baseline comes within 1%."""
    generator = np.random.default_rng(0)
    transition = generator.dirichlet(np.full(20, 0.3), size=20)
    states = np.zeros(200_000, np.int64)
    cumulative, draws = transition.cumsum(1), generator.random(200_000)
    for i in range(1, len(states)):
        states[i] = min(19, np.searchsorted(cumulative[states[i - 1]], draws[i]))
    train, held_out = states[:150_000], states[150_000:]
    share = np.bincount(states, minlength=20) / len(states)
    entropy = -(share[:, None] * transition * np.log(np.maximum(transition, 1e-300))).sum()
    result = bigram_loss(train, held_out[:-1], held_out[1:], 20)
    assert result.loss == pytest.approx(entropy, rel=0.01)


def test_bigram_gives_unseen_pairs_and_tokens_some_mass():
    train = np.array([0, 1, 0, 1, 0, 1, 2])
    result = bigram_loss(train, np.array([1, 3, 0]), np.array([3, 2, 2]), 5)
    assert math.isfinite(result.loss)
    assert result.loss > math.log(5)


def test_bigram_probabilities_sum_to_one(monkeypatch):
    """Every smoothing on the grid is a distribution: summed over all targets, each context has mass 1."""
    from gptdist.evaluate import bigram

    sums = []
    monkeypatch.setattr(bigram, "_nats", lambda p: sums.append(p.reshape(7, 7).sum(1)) or 1.0)
    train = np.random.default_rng(1).integers(0, 6, 300)  # token 6 is never seen
    contexts, targets = np.divmod(np.arange(49), 7)
    bigram_loss(train, contexts, targets, 7)
    assert len(sums) == 2 * len(bigram.DISCOUNTS) + len(bigram.WEIGHTS)
    for mass in sums:
        assert mass == pytest.approx(np.ones(7))


def test_evaluating_a_checkpoint_gives_the_trainers_loss(dataset, tmp_path):
    run_tiny(dataset, tmp_path / "run", "--train.stop_at=3", "--eval.tokens=0")
    result = evaluate_checkpoint(latest(tmp_path / "run" / "checkpoints"), None, bigram=True)
    assert result["loss"] == pytest.approx(eval_losses(tmp_path / "run")[-1], abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["margin"] == pytest.approx(result["bigram_loss"] - result["loss"])


def test_documents_are_masked_as_in_training(dataset, tmp_path):
    run_tiny(dataset, tmp_path / "run", "--train.stop_at=3", "--eval.tokens=0", "--data.document_mask=true")
    checkpoint = latest(tmp_path / "run" / "checkpoints")
    assert evaluate_checkpoint(checkpoint, None)["loss"] == pytest.approx(eval_losses(tmp_path / "run")[-1], abs=1e-5)


def test_a_damaged_checkpoint_is_not_evaluated(dataset, tmp_path):
    run_tiny(dataset, tmp_path / "run", "--train.stop_at=1")
    checkpoint = latest(tmp_path / "run" / "checkpoints")
    shard = checkpoint / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00000\.safetensors: its checksum is wrong"):
        evaluate_checkpoint(checkpoint, None)
    assert evaluate_checkpoint(checkpoint, None, verify=False)["targets"] > 0
