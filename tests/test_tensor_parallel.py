"""Tensor parallelism, alone and with FSDP2, gives the curve of one process; checkpoints go between all of them."""

import pytest

from gptdist import config as config_module
from gptdist.errors import UserError
from tests.ranks import Ranks
from tests.tensor_worker import CHAIN, LONG, MODELS, RUNS, SHORT, long_cases, main
from tests.training import assert_same_curve, eval_losses, run_tiny, train_rows

CASES = {name: case for runs in RUNS.values() for name, case in runs.items()}


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """The single-process references, then every world size started once, the chain going through all of them."""
    out = tmp_path_factory.mktemp("tensor")
    for model, options in MODELS.items():
        run_tiny(dataset, out / f"{model}-single", *options)
    run_tiny(dataset, out / "chain", *MODELS["chain"], "--train.stop_at=5")
    for world in RUNS:
        Ranks(world, out / f"world-{world}", main, dataset, out).wait()
    run_tiny(dataset, out / "chain", *MODELS["chain"])
    return out


def assert_as_single(runs, name, model, division):
    rows, reference = train_rows(runs / name), runs / f"{model}-single"
    if division[-1:] == SHORT:
        assert_same_curve(rows, train_rows(reference)[:8])
    else:
        assert_same_curve(rows, train_rows(reference))
        assert eval_losses(runs / name) == pytest.approx(eval_losses(reference), abs=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if "bf16" not in name])
def test_gives_the_curve_of_one_process(runs, name):
    assert_as_single(runs, name, *CASES[name])


def test_bf16_stays_in_a_band_of_fp32(runs):
    assert_same_curve(train_rows(runs / "bf16-tp2"), train_rows(runs / "plain-single")[:8], loss=0.02, norm=0.1)


def test_a_run_goes_on_however_it_is_divided(runs):
    """Saved by one process, tensor parallel, fsdp, both together, and continued by the next; uneven shards included."""
    assert len(CHAIN[2]) + len(CHAIN[4]) == 3
    assert_same_curve(train_rows(runs / "chain"), train_rows(runs / "chain-single"))


@pytest.mark.long
@pytest.mark.parametrize("world", LONG)
def test_all_steps_and_compiled_blocks_give_the_same_curve(runs, dataset, world):
    Ranks(world, runs / f"long-{world}", long_cases, dataset, runs).wait()
    for name, case in LONG[world].items():
        assert_as_single(runs, name, *case)


def config(**fields):
    overrides = [f"--{name.replace('__', '.')}={value}" for name, value in fields.items()]
    return config_module.load(None, ["--parallel.strategy=fsdp", *overrides])


@pytest.mark.parametrize(("fields", "message"), [
    (dict(model__context=255, train__tokens_per_step=255), "parallel.tensor=2 does not divide model.context = 255"),
    (dict(model__n_kv_heads=1), r"parallel.tensor=2 does not divide model.n_kv_heads .* = 1"),
    (dict(model__width=4, model__mlp_ratio=1.25), "does not divide the hidden width model.mlp_ratio x model.width = 5"),
    (dict(model__vocab_size=257, model__vocab_multiple=1), r"does not divide model.vocab_size, .* = 257"),
    (dict(parallel__strategy="ddp"), "parallel.tensor=2 needs parallel.strategy=fsdp or hsdp, got ddp"),
    (dict(parallel__tensor=0), "parallel.tensor is 0, expected at least 1"),
])
def test_what_cannot_be_divided_is_refused_with_its_name(fields, message):
    with pytest.raises(UserError, match=message):
        config(**{"parallel__tensor": 2} | fields)


def test_one_process_cannot_be_two():
    from gptdist.parallel.world import init_world

    with pytest.raises(UserError, match=r"parallel\.tensor=2 does not divide the 1 processes"):
        init_world(config(parallel__tensor=2).parallel)
