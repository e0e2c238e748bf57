"""A tiny GPT trains by the CUDA ops, run from their PTX, as it does by the reference: dropout, documents, bf16.

How far apart two correct runs may be follows from a third one, by the reference in fp32: the reference in bf16 is as
far from it as rounding to bf16 makes it. The kernels round in the same places, and P and dS besides; if they are no
farther from fp32 than that, the two bf16 runs are at most twice that apart.
"""

import torch

from gptdist import ops
from gptdist.config import ModelConfig, OptimConfig
from gptdist.model import Dropout, LanguageModel
from gptdist.optim.adamw import build_adamw
from gptdist.parallel.init import fill_initial_values
from tests import cuda_vm

STEPS, BATCH, CONTEXT, VOCABULARY = 20, 2, 96, 64
MODEL = ModelConfig(vocab_size=VOCABULARY, context=CONTEXT, width=128, n_layers=2, n_heads=2)
KERNELS = {"attention_forward", "attention_statistics", "attention_dkv", "attention_dq", "layer_norm", "bias_gelu",
           "cross_entropy", "dropout", "fold_partials"}


def batch(step: int):
    """tokens, targets, doc_start of counting sequences, each document with a stride of its own."""
    generator = torch.Generator().manual_seed(step)
    begins = torch.rand(BATCH, CONTEXT, generator=generator) < 0.04
    begins[:, 0] = True
    doc_start = torch.where(begins, torch.arange(CONTEXT), 0).cummax(1).values
    strides = torch.randint(1, 4, (BATCH, CONTEXT), generator=generator).gather(1, doc_start)
    tokens = (torch.arange(CONTEXT) - doc_start) * strides % VOCABULARY
    return tokens, (tokens + strides) % VOCABULARY, doc_start.int()


def train(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The losses (STEPS, BATCH, CONTEXT) of all positions, and the first step's gradients."""
    model = LanguageModel(MODEL)
    fill_initial_values(model, seed=1)
    optimizer = build_adamw(list(model.named_parameters()), OptimConfig(lr=2e-3))
    losses, first = [], {}
    for step in range(STEPS):
        tokens, targets, doc_start = batch(step)
        dropped = Dropout(0.1, ops.dropout_key(1, step), torch.arange(BATCH) + BATCH * step)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(tokens, targets, dropout=dropped, doc_start=doc_start)
        loss.mean().backward()
        first = first or {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), first


def test_a_tiny_gpt_trains_as_by_the_reference(monkeypatch):
    with cuda_vm.device().run() as log:
        losses, gradients = train()
    assert {kernel for kernel in KERNELS if any(kernel in launch.name for launch in log.launches)} == KERNELS
    monkeypatch.setenv("GPTDIST_OPS", "reference")
    expected, expected_gradients = train()
    exact, exact_gradients = train(torch.float32)
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() < 2 * (gradient - exact_gradients[name]).norm(), name
    for step in range(STEPS):
        assert (losses[step] - expected[step]).norm() < 2 * (expected[step] - exact[step]).norm(), step
    assert losses[-1].mean() < losses[0].mean() / 2  # and it learns
