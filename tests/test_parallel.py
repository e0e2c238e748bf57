"""single = ddp = fsdp at world sizes 1, 2, 3, 4, with uneven shares, accumulation, clipping, dropout and resharding."""

import shutil

import numpy as np
import pytest

from gptdist.data.format import TokenDataset
from gptdist.data.writer import write_dataset
from tests.conftest import torchrun
from tests.parallel_worker import CASES, case_options
from tests.training import assert_same_curve, eval_losses, run_tiny, train_rows

WORLDS = (1, 2, 3, 4)
CHAIN = {1: (9, "ddp"), 2: (12, "fsdp"), 3: (15, "ddp"), 4: (18, "fsdp")}  # world size -> where it stops, strategy


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """The single-process references, then every world size started once."""
    out = tmp_path_factory.mktemp("runs")
    make_masked_copy(dataset, out / "masked")
    for name in CASES:
        single = [o for o in case_options(name, out) if not o.startswith("--parallel.strategy")]
        run_tiny(dataset, out / f"{name}-single", *single, "--data.workers=0")
    run_tiny(dataset, out / "chain", "--train.stop_at=7")
    for world in WORLDS:
        stop, strategy = CHAIN[world]
        done = torchrun(world, "tests/parallel_worker.py", str(dataset), str(out), str(stop), strategy)
        assert done.returncode == 0, done.stderr[:6000]
    run_tiny(dataset, out / "chain")
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


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", [name for name in CASES if "bf16" not in name])
def test_every_strategy_and_world_size_gives_the_single_curve(runs, case, world):
    assert_same_curve(train_rows(runs / f"{case}-{world}"), train_rows(runs / f"{case}-single"))
    assert eval_losses(runs / f"{case}-{world}") == pytest.approx(eval_losses(runs / f"{case}-single"), abs=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_bf16_stays_in_a_band_of_fp32(runs, world):
    """bf16 has 8 bits of mantissa: over 20 steps the losses stay within 0.02 nats of fp32's."""
    assert_same_curve(train_rows(runs / f"fsdp-bf16-{world}"), train_rows(runs / "fsdp-single"), loss=0.02, norm=0.1)


@pytest.mark.parametrize("world", WORLDS)
def test_resume_at_the_same_world_size_is_bitwise(runs, world):
    resumed, straight = train_rows(runs / f"resumed-{world}"), train_rows(runs / f"fsdp-dropout-{world}")
    assert [(r["loss"], r["grad_norm"]) for r in resumed] == [(r["loss"], r["grad_norm"]) for r in straight]


def test_one_run_goes_on_at_every_world_size(runs):
    """7 steps on one process, to 9 on one under ddp, to 12 on two, to 15 on three, to 18 on four, to 20 on one."""
    assert_same_curve(train_rows(runs / "chain"), train_rows(runs / "fsdp-single"))


def test_dropout_changes_the_curve(runs):
    """The equalities above would also hold if dropout did nothing."""
    with_dropout, without = train_rows(runs / "fsdp-dropout-single"), train_rows(runs / "fsdp-single")
    assert abs(with_dropout[-1]["loss"] - without[-1]["loss"]) > 1e-3
