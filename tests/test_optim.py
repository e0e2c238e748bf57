import itertools
import math

import pytest
import torch

from gptdist.config import ModelConfig, OptimConfig, ScheduleConfig
from gptdist.model import LanguageModel
from gptdist.optim.adamw import build_adamw, slots
from gptdist.optim.schedule import lr_factor

STEPS = 100


def curve(**options):
    return [lr_factor(step, STEPS, ScheduleConfig(**options)) for step in range(STEPS)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_schedules_warm_up_peak_and_end_at_the_minimum(name):
    factors = curve(name=name, warmup_steps=10, min_ratio=0.1)
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(factors) == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


def test_cosine_is_half_way_down_in_the_middle():
    assert curve(name="cosine", min_ratio=0.0)[50] == pytest.approx(0.5 * (1 + math.cos(math.pi * 50 / 99)))


def test_wsd_is_stable_until_the_decay():
    factors = curve(name="wsd", warmup_steps=5, decay_fraction=0.2, min_ratio=0.0)
    assert set(factors[5:80]) == {1.0}
    assert factors[90] == pytest.approx(1 - 10 / 19)


def test_constant_stays():
    assert set(curve(name="constant")) == {1.0}


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_one_step_and_all_warmup(name):
    assert 0 <= lr_factor(0, 1, ScheduleConfig(name=name)) <= 1
    assert lr_factor(4, 5, ScheduleConfig(name=name, warmup_steps=5)) == 1.0


def test_only_matrices_decay():
    model = LanguageModel(ModelConfig(vocab_size=100, width=32, n_layers=1, n_heads=2))
    optimizer = build_adamw(list(model.named_parameters()), OptimConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for p in model.parameters():
        assert decay[id(p)] == (0.3 if p.dim() >= 2 else 0.0)


def test_slots_made_beforehand_do_not_change_the_first_step():
    def one_step(prepared):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        optimizer = build_adamw([("w", p)], OptimConfig())
        if prepared:
            assert set(slots(optimizer, p)) == {"step", "exp_avg", "exp_avg_sq"}
        p.grad = torch.ones_like(p)
        optimizer.step()
        return p.detach().clone()

    assert torch.equal(one_step(False), one_step(True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_is_torchs(dtype):
    """Over steps in which a parameter has no gradient at first, and with the gradient scaled."""
    def parameters():
        generator = torch.Generator().manual_seed(1)
        return [("matrix", torch.nn.Parameter(torch.randn(5, 7, generator=generator, dtype=dtype))),
                ("vector", torch.nn.Parameter(torch.randn(9, generator=generator, dtype=dtype)))]

    config, ours, theirs = OptimConfig(lr=0.05, weight_decay=0.3), parameters(), parameters()
    optimizer = build_adamw(ours, config)
    groups = [dict(params=[theirs[0][1]], weight_decay=0.3), dict(params=[theirs[1][1]], weight_decay=0.0)]
    reference = torch.optim.AdamW(groups, lr=0.05, betas=(config.beta1, config.beta2), eps=config.eps)
    generator = torch.Generator().manual_seed(2)
    for step in range(5):
        for (name, p), (_, q) in zip(ours, theirs, strict=True):
            if name == "vector" or step >= 2:
                p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
                q.grad = 0.25 * p.grad
        optimizer.step(grad_scale=torch.tensor(0.25))
        reference.step()
    tolerance = dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-6, atol=1e-7)
    for (_, p), (_, q), steps in zip(ours, theirs, (3, 5), strict=True):
        torch.testing.assert_close(p, q, **tolerance)
        mine = slots(optimizer, p)
        assert mine["step"].item() == reference.state[q]["step"].item() == steps
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(mine[name], reference.state[q][name], **tolerance)


def test_parameters_of_one_group_at_different_steps():
    first, late = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = build_adamw([("first", first), ("late", late)], OptimConfig(lr=0.1))
    first.grad = torch.ones(3)
    optimizer.step()
    first.grad, late.grad = None, torch.ones(3)
    optimizer.step()
    assert torch.equal(first, late)  # each has taken its step 1
