"""bf16 training of strategies that hold whole weights: the bf16 copies of the weights that the products read."""

import pytest
import torch

from gptdist.config import Config, LoRAConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from gptdist.model import build
from gptdist.optim.build import build_optimizer
from gptdist.parallel.strategies import Strategy, make_strategy
from gptdist.parallel.world import World

TOKENS = torch.arange(32).view(2, 16) % 29


def prepared(precision: str = "bf16", tied: bool = True, lora_rank: int = 0,
             optim: OptimConfig = OptimConfig()) -> Strategy:  # noqa: B008 (it is frozen)
    model = ModelConfig(context=16, width=64, n_layers=2, n_heads=2, vocab_size=29, tied=tied)
    config = Config(model=model, train=TrainConfig(precision=precision), lora=LoRAConfig(rank=lora_rank),
                    optim=optim, parallel=ParallelConfig(strategy="single", device="cpu"))
    strategy = make_strategy(World(0, 1, torch.device("cpu"), "single", None), config)
    strategy.prepare(build(config), lambda parameters: build_optimizer(parameters, strategy.config))
    return strategy


def accumulate(strategy: Strategy, micro_batches: int = 1) -> list[float]:
    losses = []
    for i in range(micro_batches):
        with strategy.micro_batch(is_last=i == micro_batches - 1):
            loss = strategy(TOKENS, TOKENS.roll(-1)).sum()
            strategy.backward(loss, TOKENS.numel() * micro_batches)
            losses.append(loss.item() / TOKENS.numel())
    return losses


def step(strategy: Strategy) -> float:
    (loss,) = accumulate(strategy)
    strategy.grad_norm()
    strategy.apply(1e-3, clip=1.0)
    return loss


def assert_fresh(strategy: Strategy) -> None:
    assert strategy.shadows
    for parameter, shadow in strategy.shadows.items():
        assert torch.equal(shadow, parameter.detach().to(torch.bfloat16))


@pytest.mark.parametrize("tied", [True, False])
def test_every_step_writes_them(tied):
    strategy = prepared(tied=tied)
    assert_fresh(strategy)
    before = [p.detach().clone() for p in strategy.shadows]
    for _ in range(2):
        step(strategy)
        assert_fresh(strategy)
    assert all(not torch.equal(a, b) for a, b in zip(before, strategy.shadows, strict=True))


def test_every_matrix_product_has_one():
    strategy = prepared()
    names = {name for name, p in strategy.model.named_parameters() if p in strategy.shadows}
    layers = ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")
    assert names == {"wte.weight", *(f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers)}
    assert not prepared("fp32").shadows


def test_loaded_values_reach_them():
    strategy = prepared()
    for tensor in strategy.model_state().values():
        tensor.add_(1.0)
    strategy.loaded()
    assert_fresh(strategy)


def test_frozen_weights_have_one():
    strategy = prepared(lora_rank=2)
    step(strategy)
    assert_fresh(strategy)


def test_losses_are_those_of_autocast_alone():
    """A product of the shadow is the product of the weight that autocast casts, bit for bit."""
    ours, without = prepared(), prepared()
    for module in without.model.modules():
        if "shadow" in vars(module):
            module.shadow = None
    without.model.head_shadow = None
    without.optimizer.shadows = {}
    assert [step(ours) for _ in range(4)] == pytest.approx([step(without) for _ in range(4)], abs=1e-6)


def test_gradients_of_micro_batches_are_summed_in_fp32():
    one, several = prepared(), prepared()
    accumulate(one)
    accumulate(several, micro_batches=3)
    weight = "blocks.0.mlp.fc.weight"
    single, total = (dict(s.model.named_parameters())[weight].grad for s in (one, several))
    assert (single.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert (total - single.float()).norm() < 2**-7 * single.float().norm()


def test_products_outside_autocast_read_the_weight():
    strategy = prepared()
    with torch.no_grad():
        assert strategy.model(TOKENS, TOKENS).dtype == torch.float32
