"""single = ddp = fsdp at world sizes 1, 2, 3, 4, with uneven shares, accumulation, clipping, dropout and resharding."""

import shutil

import numpy as np
import pytest

from gptdist.checkpoint import layout
from gptdist.checkpoint.stream import TensorReader
from gptdist.data.format import TokenDataset
from gptdist.data.writer import write_dataset
from gptdist.errors import UserError
from gptdist.metrics import read_rows
from tests.parallel_worker import (
    CASES,
    CHAINS,
    PROMPT,
    REFERENCES,
    RESUMED,
    SHORT,
    cases_of,
    long_cases,
    main,
    reference_options,
    resumed_at,
)
from tests.ranks import Ranks
from tests.training import assert_same_curve, eval_losses, run_tiny, train_rows

WORLDS = (1, 2, 3, 4)
CHAIN = {1: (9, "ddp"), 2: (12, "fsdp"), 3: (15, "ddp"), 4: (18, "fsdp")}  # world size -> where it stops, strategy


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """The single-process references, then every world size started once."""
    out = tmp_path_factory.mktemp("runs")
    make_masked_copy(dataset, out / "masked")
    for name in REFERENCES:
        prompt = [PROMPT] if name == CASES["fsdp"].reference else []
        run_tiny(dataset, out / f"{name}-single", *reference_options(name, out), *prompt, "--train.micro_batch=6",
                 "--data.workers=0")
    for name, reference in CHAINS.items():
        run_tiny(dataset, out / name, *reference_options(reference, out), "--train.stop_at=7")
    for world in WORLDS:
        Ranks(world, out / f"world-{world}", main, dataset, out, *CHAIN[world]).wait()
    for name, reference in CHAINS.items():
        run_tiny(dataset, out / name, *reference_options(reference, out))
    return out


def make_masked_copy(dataset, path):
    """The dataset with a loss mask in runs, so that some sequences have no target at all and others all of them."""
    shutil.copytree(dataset, path)
    shutil.rmtree(path / "train")
    source = TokenDataset.open(dataset / "train")
    tokens = source.window(0, len(source))
    mask = np.repeat(np.random.default_rng(0).random(len(tokens) // 50 + 1) < 0.3, 50)[:len(tokens)]
    with write_dataset(path / "train", tokenizer_hash=source.meta.tokenizer_hash, vocab_size=source.meta.vocab_size,
                       eot=source.meta.eot, loss_mask=True) as writer:
        writer.add(tokens, mask.astype(np.uint8))


def assert_as_single(runs, case, world):
    """Up to the step at which the case stops: bf16 in a band, for it has 8 bits of mantissa."""
    run, reference = runs / f"{case}-{world}", runs / f"{CASES[case].reference}-single"
    rows = train_rows(run)
    assert len(rows) == (10 if SHORT[0] in CASES[case].overrides else 20)
    straight = train_rows(reference)[:len(rows)]
    if case.endswith("bf16"):
        assert_same_curve(rows, straight, loss=0.02, norm=0.1)
        return
    # Muon raises an adapter's smallest singular values, and with them what rounding made of them, 500 times.
    assert_same_curve(rows, straight, norm=2e-3 if case == "fsdp-muon-lora" else 1e-4)
    losses = eval_losses(run)
    assert len(losses) == len(rows) // 10
    assert losses == pytest.approx(eval_losses(reference)[:len(losses)], abs=1e-5)


def assert_resumed_bitwise(runs, case, world):
    resumed, straight = train_rows(runs / f"{case}-resumed-{world}"), train_rows(runs / f"{case}-{world}")
    assert len(resumed) == len(straight) - RESUMED[case]
    assert [(r["loss"], r["grad_norm"]) for r in resumed] == [
        (r["loss"], r["grad_norm"]) for r in straight[RESUMED[case]:]]


@pytest.mark.parametrize(("case", "world"), [(case, world) for world in WORLDS for case in cases_of(world)])
def test_every_strategy_and_world_size_gives_the_single_curve(runs, case, world):
    assert_as_single(runs, case, world)


@pytest.mark.parametrize("world", WORLDS)
def test_every_world_size_writes_the_same_sample(runs, world):
    samples = [[row["sample"] for row in read_rows(runs / run / "metrics.jsonl") if row["kind"] == "eval"]
               for run in (f"fsdp-{world}", "dropout-single")]
    assert samples[0] == samples[1]
    assert all(sample.startswith("The") for sample in samples[0])


@pytest.mark.parametrize(("world", "case"), [(world, case) for world in WORLDS for case in resumed_at(world)])
def test_resume_at_the_same_world_size_is_bitwise(runs, world, case):
    assert_resumed_bitwise(runs, case, world)


@pytest.mark.long
@pytest.mark.parametrize("world", WORLDS)
def test_further_cases_give_the_single_curve(runs, dataset, world):
    Ranks(world, runs / f"long-{world}", long_cases, dataset, runs).wait()
    for case in cases_of(world, long=True):
        assert_as_single(runs, case, world)
    for case in resumed_at(world, long=True):
        assert_resumed_bitwise(runs, case, world)


@pytest.mark.parametrize(("chain", "straight"), [(chain, f"{name}-single") for chain, name in CHAINS.items()])
def test_one_run_goes_on_at_every_world_size(runs, chain, straight):
    """7 steps on one process, to 9 on one under ddp, to 12 on two, to 15 on three, to 18 on four, to 20 on one."""
    assert_same_curve(train_rows(runs / chain), train_rows(runs / straight))


def test_muon_has_one_slot_for_a_matrix_of_the_blocks_and_keeps_adamws_for_the_rest(runs):
    slots: dict[str, set[str]] = {}
    for key in TensorReader(layout.resolve(str(runs / "fsdp-muon-2"))).index:
        if key.startswith("optim."):
            name, _, slot = key.removeprefix("optim.").rpartition(".")
            slots.setdefault(name, set()).add(slot)
    assert slots["blocks.1.attn.qkv.weight"] == {"momentum_buffer"}
    for name in ("wte.weight", "wpe.weight", "blocks.1.attn.qkv.bias", "blocks.1.ln_1.weight"):
        assert slots[name] == {"step", "exp_avg", "exp_avg_sq"}


def test_a_run_keeps_its_optimizer(runs, dataset):
    with pytest.raises(UserError, match=r"optim\.name=muon, this run optim\.name=adamw"):
        run_tiny(dataset, runs / "chain-muon", "--model.n_kv_heads=2", "--train.steps=21")


def test_dropout_changes_the_curve(runs):
    """The equalities above would also hold if dropout did nothing."""
    with_dropout, without = train_rows(runs / "dropout-single"), train_rows(runs / "plain-single")
    assert abs(with_dropout[-1]["loss"] - without[-1]["loss"]) > 1e-3
