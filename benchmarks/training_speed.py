"""Tokens per second and MFU of training steps on synthetic tokens, with the project's own model and strategy.

Three sets of ops in the same model: the compiled kernels, this project's reference, and PyTorch's own functions (flash
attention, layer_norm, gelu, cross_entropy), which is what one would write without this project. With torch.compile the
first two compile block by block (train.compile), PyTorch's ops the whole model. bf16 autocast, fp32 master weights,
gradient norm, clipping and AdamW in every step.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmarks.checks import reference
from benchmarks.timing import synchronize
from gptdist import ops
from gptdist.config import Config, ModelConfig, TrainConfig
from gptdist.metrics import flops_per_token, peak_flops
from gptdist.model import build_meta
from gptdist.optim.adamw import build_adamw
from gptdist.parallel import strategies
from gptdist.parallel.world import World

GIB = 1 << 30
WARM_UP_STEPS, STEPS = 3, 10
LEARNING_RATE, CLIP = 1e-4, 1.0
GPT2 = ModelConfig(vocab_size=50257, context=1024, width=768, n_layers=12, n_heads=12)
GPT2_XL = ModelConfig(vocab_size=50257, context=1024, width=1600, n_layers=48, n_heads=25)
TINY = ModelConfig(vocab_size=100, context=32, width=128, n_layers=2, n_heads=2)


@dataclass(frozen=True)
class Variant:
    """A model and how it runs. backend: kernels, reference or PyTorch. memory: bytes that it may need."""

    model_name: str
    model: ModelConfig
    micro_batch: int
    backend: str
    compiled: bool
    memory: int

    @property
    def name(self) -> str:
        return f"{self.backend}, {'torch.compile' if self.compiled else 'eager'}"


@dataclass(frozen=True)
class Speed:
    """What one variant reached; mfu is None where the GPU's peak is unknown, all are where it did not run (`note`)."""

    model: str
    variant: str
    tokens_per_step: int
    step_ms: float | None
    tokens_per_s: float | None = None
    mfu: float | None = None
    loss: float | None = None
    note: str = ""


def variants(tiny: bool) -> Iterator[Variant]:
    """In the order of their worth: compiling takes a minute, and the last ones may not be reached."""
    small, large = ("GPT-2 124M", GPT2, 16), ("GPT-2 1.5B", GPT2_XL, 4)
    if tiny:
        yield from (Variant("tiny", TINY, 2, backend, False, 0) for backend in ("kernels", "reference", "PyTorch"))
        return
    yield Variant(*small, "kernels", False, 30 * GIB)
    yield Variant(*small, "PyTorch", True, 30 * GIB)
    yield Variant(*small, "PyTorch", False, 30 * GIB)
    yield Variant(*small, "reference", False, 30 * GIB)
    yield Variant(*large, "kernels", False, 60 * GIB)
    yield Variant(*small, "kernels", True, 30 * GIB)
    yield Variant(*large, "PyTorch", True, 60 * GIB)
    yield Variant(*small, "reference", True, 30 * GIB)


# PyTorch's functions under the names of gptdist.ops, for a model without dropout and documents


def torch_attention(qkv, *, doc_start=None):
    assert doc_start is None
    B, T, H, slots, D = qkv.shape
    q = qkv[:, :, :, :-2].flatten(2, 3).transpose(1, 2)  # (B, H, T, D)
    k, v = (qkv[:, :, :, i].transpose(1, 2) for i in (-2, -1))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=slots > 3)
    return out.transpose(1, 2).reshape(B, T, H, slots - 2, D)


def torch_layer_norm(x, weight, bias, eps, *, dtype=None):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(dtype or x.dtype)


def torch_residual_layer_norm(x, residual, weight, bias, eps):
    s = x + residual
    return torch_layer_norm(s, weight, bias, eps), s


def torch_bias_gelu(x, bias):
    return F.gelu(x + bias.to(x.dtype), approximate="tanh")


def torch_linear_cross_entropy(hidden, weight, targets, *, vocab_size, ignore_index, shadow=None):
    return F.cross_entropy(F.linear(hidden, weight[:vocab_size]), targets, ignore_index=ignore_index, reduction="none")


@contextmanager
def torch_ops():
    functions = {
        "attention": torch_attention,
        "layer_norm": torch_layer_norm,
        "residual_layer_norm": torch_residual_layer_norm,
        "bias_gelu": torch_bias_gelu,
        "linear_cross_entropy": torch_linear_cross_entropy,
    }
    with patch.multiple(ops, **functions):
        yield


CONTEXTS = {"kernels": nullcontext, "reference": reference, "PyTorch": torch_ops}


# a run


def random_values(model, *, seed: int) -> None:
    """Initial values drawn on the device: drawing 1.5 billion on the CPU, as parallel/init.py does, takes long."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def prepared(variant: Variant, device: torch.device) -> strategies.Strategy:
    whole = variant.compiled and variant.backend == "PyTorch"
    train = TrainConfig(precision="bf16", compile=variant.compiled and not whole)
    config = dataclasses.replace(Config(), model=variant.model, train=train)
    strategy = strategies.make_strategy(World(0, 1, device, "single", None), config)
    with patch.object(strategies, "fill_initial_values", random_values):
        strategy.prepare(build_meta(variant.model), lambda parameters: build_adamw(parameters, config.optim))
    if whole:
        strategy.model.compile()
    return strategy


def step(strategy: strategies.Strategy, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with strategy.micro_batch(is_last=True):
        loss = strategy(tokens, targets).sum()
        strategy.backward(loss, targets.numel())
    strategy.grad_norm()
    strategy.apply(LEARNING_RATE, CLIP)
    return loss.detach() / targets.numel()


def measure(variant: Variant, device: torch.device) -> Speed:
    """Median of STEPS steps after WARM_UP_STEPS, on the same random tokens."""
    shape = variant.micro_batch, variant.model.context
    n_tokens = shape[0] * shape[1]
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < variant.memory:
        note = f"not run: less than {variant.memory // GIB} GiB of memory are free"
        return Speed(variant.model_name, variant.name, n_tokens, None, note=note)
    strategy = prepared(variant, device)
    tokens, targets = (torch.randint(variant.model.vocab_size, shape, device=device) for _ in range(2))
    times = []
    for _ in range(WARM_UP_STEPS + STEPS):
        synchronize(device)
        start = time.perf_counter()
        loss = step(strategy, tokens, targets)
        synchronize(device)
        times.append(time.perf_counter() - start)
    step_s = statistics.median(times[WARM_UP_STEPS:])
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    mfu = flops_per_token(variant.model, strategy.n_parameters) * n_tokens / step_s / peak if peak else None
    return Speed(variant.model_name, variant.name, n_tokens, step_s * 1e3, n_tokens / step_s, mfu, loss.item())


def speeds(device: torch.device, tiny: bool) -> Iterator[Speed]:
    for variant in variants(tiny):
        try:
            with CONTEXTS[variant.backend]():
                speed = measure(variant, device)
        except Exception as error:  # whatever a compiler raises, or no memory: the other variants go on
            note = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            n_tokens = variant.micro_batch * variant.model.context
            speed = Speed(variant.model_name, variant.name, n_tokens, None, note=note)
        yield speed
        gc.collect()
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
