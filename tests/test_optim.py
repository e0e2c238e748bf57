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
