"""Muon in one process, against float64 and singular values; test_parallel.py has it in several."""

import dataclasses
import math

import pytest
import torch

from gptdist.config import Config, LoRAConfig, ModelConfig, OptimConfig, ParallelConfig, TaskConfig, TrainConfig
from gptdist.model import build, build_meta
from gptdist.optim.adamw import slots
from gptdist.optim.build import build_optimizer
from gptdist.optim.muon import Muon, build_muon, orthogonal
from gptdist.parallel.init import fill_initial_values
from tests.test_shadows import assert_fresh, prepared, step

MODEL = ModelConfig(context=16, width=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=29)
OPTIM = OptimConfig(name="muon", lr=3e-3, muon_lr=0.03, weight_decay=0.2, momentum=0.9)
FP32 = TrainConfig(precision="fp32")


def polynomial(s, steps):
    """What the iteration makes of a singular value."""
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def by_singular_values(matrix, steps):
    """orthogonal(), in another way and in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ torch.diag(polynomial(s / s.norm(), steps)) @ v


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 7), (7, 1)])
@pytest.mark.parametrize("steps", [1, 5])
def test_orthogonal_is_the_polynomial_of_the_singular_values(shape, steps):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(orthogonal(matrix, steps), by_singular_values(matrix, steps), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(orthogonal(matrix.float(), steps).double(), by_singular_values(matrix, steps),
                               rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(orthogonal(matrix.bfloat16(), steps).double(), by_singular_values(matrix, steps),
                               rtol=0.1, atol=0.1)


def test_five_steps_bring_singular_values_near_one():
    matrix = torch.randn(24, 64, generator=torch.Generator().manual_seed(3))
    for scale in (1e-12, 1.0, 1e6):
        s = torch.linalg.svdvals(orthogonal(matrix * scale, 5))
        assert s.min() > 0.6
        assert s.max() < 1.3


def test_a_matrix_of_zeros_stays():
    assert not orthogonal(torch.zeros(3, 4), 5).any()


def reference_step(w, g, momentum, rows, config, lr):
    """One step of Muon on a weight, `rows` being the row numbers of its independent matrices; float64."""
    momentum.mul_(config.momentum).add_(g, alpha=1 - config.momentum)
    u = (1 - config.momentum) * g + config.momentum * momentum if config.nesterov else momentum
    w.mul_(1 - lr * config.weight_decay)
    for numbers in rows:
        part = by_singular_values(u[numbers], config.newton_schulz_steps)
        w[numbers] -= lr * math.sqrt(max(1, part.shape[0] / part.shape[1])) * part


def rows_of(name, shape, model):
    """The rows of q, k and v in a packed qkv, one by one; all rows of any other matrix."""
    if not name.endswith("attn.qkv.weight"):
        return [list(range(shape[0]))]
    q_per_kv, found = model.n_heads // model.n_kv_heads, ([], [], [])
    for head in range(model.n_kv_heads):
        for slot in range(q_per_kv + 2):
            first = (head * (q_per_kv + 2) + slot) * model.head_dim
            found[max(0, slot - q_per_kv + 1)].extend(range(first, first + model.head_dim))
    return found


def parameters(dtype=torch.float32):
    model = build_meta(MODEL).to_empty(device="cpu").to(dtype)
    fill_initial_values(model, seed=1)
    return list(model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_float64_by_singular_values(dtype, nesterov):
    optim = OptimConfig(**{**OPTIM.__dict__, "nesterov": nesterov})
    named = parameters(dtype)
    optimizer = build_muon(named, Config(model=MODEL, optim=optim, train=FP32))
    optimizer.dtype = dtype
    weights = {name: p.detach().double().clone() for name, p in named}
    buffers = {name: torch.zeros_like(w) for name, w in weights.items()}
    generator = torch.Generator().manual_seed(2)
    for lr in (3e-3, 1e-3):
        optimizer.set_lr(lr)
        for name, p in named:
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
            if p.dim() == 2 and name.startswith("blocks."):
                reference_step(weights[name], 0.5 * p.grad.double(), buffers[name], rows_of(name, p.shape, MODEL),
                               optim, lr * optim.muon_lr / optim.lr)
        optimizer.step(grad_scale=torch.tensor(0.5))
    tolerance = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-5)
    compared = 0
    for name, p in named:
        if p.dim() == 2 and name.startswith("blocks."):
            torch.testing.assert_close(p.detach().double(), weights[name], **tolerance)
            torch.testing.assert_close(slots(optimizer, p)["momentum_buffer"].double(), buffers[name], **tolerance)
            compared += 1
    assert compared == 4 * MODEL.n_layers


def test_all_else_takes_adamws_steps():
    config = Config(model=MODEL, optim=OPTIM, train=FP32)
    ours, theirs = parameters(), parameters()
    adamw = OptimConfig(lr=OPTIM.lr, weight_decay=OPTIM.weight_decay)
    optimizers = build_optimizer(ours, config), build_optimizer(theirs, Config(model=MODEL, optim=adamw, train=FP32))
    for named, optimizer in zip((ours, theirs), optimizers, strict=True):
        generator = torch.Generator().manual_seed(2)
        for _, p in named:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.set_lr(1e-3)
        optimizer.step()
    same = {name for (name, p), (_, q) in zip(ours, theirs, strict=True) if torch.equal(p, q)}
    assert same == {name for name, p in ours if p.dim() < 2 or not name.startswith("blocks.")}


def matrices_of(config):
    named = [(name, p) for name, p in build(config).named_parameters() if p.requires_grad]
    optimizer = build_optimizer(named, dataclasses.replace(config, train=FP32))
    assert isinstance(optimizer, Muon)
    return {name for name, p in named if optimizer.slot_names(p) == ("momentum_buffer",)}, {name for name, _ in named}


def test_only_matrices_that_train_are_muons():
    lora = Config(model=MODEL, optim=OPTIM, train=FP32, lora=LoRAConfig(rank=2, split_qkv=True))
    taken, trained = matrices_of(lora)
    assert taken == trained == {name for name in trained if name.endswith(("lora_A", "lora_B"))}
    frozen = Config(model=MODEL, optim=OPTIM, task=TaskConfig(name="instruct", freeze="last:1"))
    taken, trained = matrices_of(frozen)
    assert taken == {f"blocks.1.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")}
    assert trained - taken >= {"wte.weight", "blocks.1.attn.qkv.bias"}
    head = Config(model=MODEL, optim=OPTIM, task=TaskConfig(name="instruct", freeze="head"))
    assert matrices_of(head) == (set(), {"wte.weight"})


def test_adapters_of_queries_keys_and_values_are_matrices_of_their_own():
    config = Config(model=MODEL, optim=OPTIM, train=FP32, lora=LoRAConfig(rank=2, split_qkv=True))
    model = build(config).to_empty(device="cpu")
    fill_initial_values(model, seed=1)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(named, config)
    a = dict(named)["blocks.0.attn.qkv.lora_A"]
    before = a.detach().clone()
    a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(2))
    a.grad[2:4] *= 1e-6  # a scale of its own: the keys' step is as large as the others'
    optimizer.set_lr(OPTIM.lr)
    optimizer.step()
    moved = (before * (1 - OPTIM.muon_lr * OPTIM.weight_decay) - a.detach()) / OPTIM.muon_lr
    for part in moved.chunk(3):
        torch.testing.assert_close(part.norm(), torch.tensor(math.sqrt(2)), rtol=0.3, atol=0)


def test_copies_in_bf16_follow():
    strategy = prepared(optim=OptimConfig(name="muon"))
    assert strategy.optimizer.dtype == torch.bfloat16
    assert_fresh(strategy)
    before = [p.detach().clone() for p in strategy.shadows]
    step(strategy)
    assert_fresh(strategy)
    assert all(not torch.equal(a, b) for a, b in zip(before, strategy.shadows, strict=True))


def test_hsdp_is_allowed():
    assert Config(optim=OPTIM, parallel=ParallelConfig(strategy="hsdp")).optim.name == "muon"
