import math

import pytest
import torch
from torch.nn import functional as F

from gptdist.config import ModelConfig
from gptdist.convert.hf import gpt2_to_state
from gptdist.model import Dropout, LanguageModel, build_meta, initial_values, parameter_count
from gptdist.ops import dropout_key
from gptdist.parallel.init import fill_initial_values

SMALL = {"vocab_size": 101, "width": 48, "n_layers": 3, "n_heads": 4, "context": 24}


def small_model(**options) -> LanguageModel:
    model = LanguageModel(ModelConfig(**(SMALL | options)))
    fill_initial_values(model, seed=1)
    return model


def tokens_and_targets(B=3, T=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 101, (B, T + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_equal_hugging_face(tied):
    transformers = pytest.importorskip("transformers", reason="the reference is transformers' GPT2LMHeadModel")
    torch.manual_seed(0)
    hf_config = transformers.GPT2Config(
        vocab_size=101, n_positions=24, n_embd=48, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        tie_word_embeddings=tied)
    hf = transformers.GPT2LMHeadModel(hf_config)
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=0.1)  # also biases and norms, so that each one counts
    config = ModelConfig(**SMALL, tied=tied)
    model = LanguageModel(config)
    model.load_state_dict(gpt2_to_state(hf.state_dict(), config))

    tokens, targets = tokens_and_targets()
    ours = model.logits(model.hidden(tokens))
    theirs = hf(tokens).logits
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4
    model(tokens, targets).mean().backward()
    F.cross_entropy(theirs.flatten(0, 1), targets.flatten()).backward()
    gradients = gpt2_to_state({name: p.grad for name, p in hf.named_parameters()}, config)
    for name, p in model.named_parameters():
        assert (p.grad - gradients[name]).abs().max() < 1e-4, name


def test_book_parameter_counts():
    """Raschka, chapter 4: GPT-2 124M with an untied head and no qkv bias."""
    gpt2 = {"vocab_size": 50257, "vocab_multiple": 1, "context": 1024, "width": 768, "n_layers": 12, "n_heads": 12}
    assert parameter_count(ModelConfig(**gpt2, tied=False, qkv_bias=False)) == 163_009_536
    assert parameter_count(ModelConfig(**gpt2, qkv_bias=False)) == 124_412_160
    assert parameter_count(ModelConfig(**gpt2)) == 124_439_808  # with qkv bias, as released


def test_initial_loss_is_that_of_a_uniform_guess():
    tokens, targets = tokens_and_targets()
    assert small_model()(tokens, targets).mean().item() == pytest.approx(math.log(101), abs=0.1)


def test_padded_logits_have_no_mass_and_no_gradient():
    model = small_model()
    tokens, targets = tokens_and_targets()
    model(tokens, targets).mean().backward()
    assert model.wte.weight.shape[0] == 128
    assert model.wte.weight.grad[101:].abs().max() == 0
    assert model.logits(model.hidden(tokens)).shape[-1] == 101


def test_initial_values_are_a_function_of_name_and_position():
    whole = initial_values("w.weight", (1000, 300), 0, 300_000, n_layers=4, seed=3)
    part = initial_values("w.weight", (1000, 300), 123_456, 1000, n_layers=4, seed=3)
    assert torch.equal(part, whole[123_456:124_456])
    assert whole.std().item() == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(whole[:99], initial_values("v.weight", (1000, 300), 0, 99, n_layers=4, seed=3))
    assert not torch.equal(whole[:99], initial_values("w.weight", (1000, 300), 0, 99, n_layers=4, seed=4))
    scaled = initial_values("a.proj.weight", (1000, 300), 0, 300_000, n_layers=8, seed=3)
    assert scaled.std().item() == pytest.approx(0.02 / 4, rel=0.02)


def test_tied_weights_stay_tied_through_meta():
    model = build_meta(ModelConfig(**SMALL))
    model.to_empty(device="cpu")
    assert model.head_weight is model.wte.weight
    assert [name for name, _ in model.named_parameters()].count("wte.weight") == 1


@pytest.mark.parametrize("options", [{}, {"positions": "rope", "n_kv_heads": 2}, {"bias": False, "tied": False}])
def test_causal(options):
    """A position's output does not depend on later tokens."""
    model = small_model(**options)
    tokens, _ = tokens_and_targets()
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 7) % 101
    a, b = model.hidden(tokens), model.hidden(changed)
    assert torch.allclose(a[:, :12], b[:, :12], atol=1e-6)
    assert not torch.allclose(a[:, 12:], b[:, 12:], atol=1e-3)


def test_documents_do_not_see_each_other():
    """With learned positions and doc_start, the second half equals a run whose first half was something else."""
    model = small_model()
    tokens, _ = tokens_and_targets()
    doc_start = torch.zeros(3, 24, dtype=torch.int32)
    doc_start[:, 12:] = 12
    changed = tokens.clone()
    changed[:, :12] = (changed[:, :12] + 5) % 101
    a, b = (model.hidden(t, doc_start=doc_start)[:, 12:] for t in (tokens, changed))
    assert torch.allclose(a, b, atol=1e-6)


def gradients(model, dropout=None):
    tokens, targets = tokens_and_targets()
    model.zero_grad()
    loss = model(tokens, targets, dropout=dropout).mean()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("every", [1, 2])
def test_activation_checkpointing_changes_nothing(p, every):
    model = small_model()
    dropout = Dropout(p, dropout_key(1, 2, "cpu"), torch.arange(3)) if p else None
    loss, kept = gradients(model, dropout)
    model.checkpoint_blocks(every)
    again, recomputed = gradients(model, dropout)
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_dropout_follows_the_sample_not_its_place_in_the_batch():
    model = small_model()
    tokens, targets = tokens_and_targets()
    key = dropout_key(1, 2, "cpu")
    whole = model(tokens, targets, dropout=Dropout(0.2, key, torch.tensor([10, 11, 12])))
    alone = model(tokens[2:], targets[2:], dropout=Dropout(0.2, key, torch.tensor([12])))
    assert torch.allclose(whole[2:], alone, atol=1e-5)
    other = model(tokens[2:], targets[2:], dropout=Dropout(0.2, key, torch.tensor([13])))
    assert not torch.allclose(whole[2:], other, atol=1e-3)


def test_compiles_without_graph_breaks():
    model = small_model(dropout=0.1)
    tokens, targets = tokens_and_targets()
    dropout = Dropout(0.1, dropout_key(1, 2, "cpu"), torch.arange(3))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(tokens, targets, dropout=dropout)
    assert torch.allclose(compiled(tokens, targets, dropout=dropout), expected, atol=1e-5)


def test_ignored_targets_have_no_loss():
    model = small_model()
    tokens, targets = tokens_and_targets()
    targets[0] = -100
    losses = model(tokens, targets)
    assert losses[0].abs().max() == 0
    assert losses[1:].min() > 0
