"""single = zero1 = zero2 = zero3 = hsdp at world sizes 1 to 4, with uneven shares, accumulation, clipping and dropout;
and one run that goes on under every strategy, from checkpoint to checkpoint."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.ranks import Ranks
from tests.training import TINY, assert_same_curve, eval_losses, run_tiny, train_rows
from tests.zero_worker import CASES, CHAIN, DROPOUT, GOES_ON, LONG, SHORT, long_cases, main

pytest.importorskip("deepspeed", reason="pip install --no-build-isolation deepspeed")

WORLDS = tuple(CASES)
FP32 = [(world, name) for world in WORLDS for name in CASES[world] if "bf16" not in name]
BF16 = [(world, name) for world in WORLDS for name in CASES[world] if "bf16" in name]


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """The single-process reference, then every world size started once."""
    out = tmp_path_factory.mktemp("runs")
    run_tiny(dataset, out / "single", *DROPOUT)
    run_tiny(dataset, out / "chain", "--train.stop_at=2", *DROPOUT)
    for world in WORLDS:
        Ranks(world, out / f"world-{world}", main, dataset, out).wait()
    run_tiny(dataset, out / "chain", *DROPOUT)
    return out


def assert_as_single(run, single, overrides):
    rows = train_rows(run)
    if overrides[:len(SHORT)] == SHORT:
        assert_same_curve(rows, train_rows(single)[:10])
    else:
        assert_same_curve(rows, train_rows(single))
        assert eval_losses(run)[-1:] == pytest.approx(eval_losses(single), abs=1e-5)  # a run that stops evaluates too


@pytest.mark.parametrize(("world", "name"), FP32)
def test_every_strategy_and_world_size_gives_the_single_curve(runs, world, name):
    assert_as_single(runs / f"{name}-{world}", runs / "single", CASES[world][name])


@pytest.mark.parametrize(("world", "name"), BF16)
def test_bf16_stays_in_a_band_of_fp32(runs, world, name):
    """bf16 has 8 bits of mantissa: over 10 steps the losses stay within 0.02 nats of fp32's."""
    rows = train_rows(runs / f"{name}-{world}")
    assert_same_curve(rows, train_rows(runs / "single")[:10], loss=0.02, norm=0.1)


def test_one_run_goes_on_under_every_strategy(runs):
    """At world sizes 1, 1, 2, 3, 4, 1, under another strategy each time."""
    assert {strategy for part in CHAIN.values() for _, strategy in part} == {"fsdp", "hsdp", "zero1", "zero2", "zero3"}
    assert_same_curve(train_rows(runs / "chain"), train_rows(runs / "single"))


def test_resume_at_the_same_world_size_is_bitwise(runs):
    resumed, straight = train_rows(runs / "zero3-from-zero3"), train_rows(runs / "zero3-2")[8:10]
    assert [(r["loss"], r["grad_norm"]) for r in resumed] == [(r["loss"], r["grad_norm"]) for r in straight]


@pytest.mark.parametrize(("saved", "strategy"), [(saved, other) for saved in GOES_ON for other in GOES_ON[saved]])
def test_a_save_in_the_background_has_the_state_of_its_step(runs, saved, strategy):
    """Saved while the next steps changed the partitions; another stage goes on from it."""
    assert_same_curve(train_rows(runs / f"{strategy}-from-{saved}"), train_rows(runs / "single")[8:10])


def test_init_from_takes_the_weights(runs):
    """From a run of 20 steps: the loss goes on from there, and not from log(vocabulary)."""
    first, last = train_rows(runs / "init-2")[0], train_rows(runs / "single")[-1]
    assert first["step"] == 1
    assert first["loss"] < last["loss"] + 0.3


def test_the_deepspeed_launcher_takes_the_same_yaml(dataset, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TINY | {"data": {"path": str(dataset)},
                                           "parallel": TINY["parallel"] | {"strategy": "zero2"}}))
    arguments = ["train", str(path), "--train.steps=4", "--eval.every=0"]
    launcher = shutil.which("deepspeed") or str(Path(sys.executable).with_name("deepspeed"))
    done = subprocess.run([launcher, "--num_gpus", "2", "--master_port", "29611", "--module", "gptdist", *arguments,
                           f"--run.dir={tmp_path / 'launcher'}"], capture_output=True, text=True, cwd=ROOT, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                                                                  "TORCHDYNAMO_DISABLE": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    single = run_tiny(dataset, tmp_path / "single", "--train.steps=4", "--eval.every=0")
    assert_same_curve(train_rows(tmp_path / "launcher"), single)


@pytest.mark.long
@pytest.mark.parametrize("world", WORLDS)
def test_all_steps_with_a_resume_give_the_single_curve(dataset, runs, world):
    """DeepSpeed's own CPU Adam too, which is compiled at first use and keeps its step counters in Python."""
    Ranks(world, runs / f"long-{world}", long_cases, dataset, runs).wait()
    for name, overrides in LONG[world].items():
        assert_as_single(runs / f"{name}-{world}", runs / "single", overrides)
