"""The trainer in one process: resuming, stopping, best and last checkpoints, bad starts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from gptdist import config as config_module
from gptdist.checkpoint import layout, store
from gptdist.checkpoint.restore import load_model
from gptdist.data.loader import PretrainSource
from gptdist.errors import EXIT_REQUEUE, UserError
from gptdist.metrics import plot_losses, read_rows
from gptdist.parallel.world import init_world
from gptdist.trainer import Trainer
from tests.conftest import ROOT
from tests.training import TINY, assert_same_curve, eval_losses, run_tiny, tiny_config, train_rows


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A finished run of 20 steps with an evaluation and a checkpoint each 5."""
    run = tmp_path_factory.mktemp("finished") / "run"
    run_tiny(dataset, run, "--eval.every=5", "--checkpoint.every=5", "--run.tensorboard=true")
    return run


def losses(rows):
    return [(row["step"], row["loss"], row["grad_norm"], row["data_hash"]) for row in rows]


def test_the_loss_falls(finished):
    rows = train_rows(finished)
    assert rows[-1]["loss"] < rows[0]["loss"] - 1.0
    assert [row["step"] for row in rows] == list(range(1, 21))


def test_retention_keeps_the_last_and_the_best(finished):
    complete, incomplete = layout.scan(finished / "checkpoints")
    assert not incomplete
    assert [p.name for p in complete][-2:] == ["step-00000015", "step-00000020"]
    best = layout.read_train_state(layout.best(finished / "checkpoints"))
    assert best["val_loss"] == min(eval_losses(finished))


def test_a_checkpoint_holds_the_run(finished):
    checkpoint = layout.latest(finished / "checkpoints")
    state = layout.read_train_state(checkpoint)
    assert state["step"] == 20
    assert state["next_sample"] == 20 * 11
    assert state["tokens"] == 20 * 352
    keys = set(store.read_index(checkpoint))
    assert {"model.wte.weight", "optim.wte.weight.exp_avg", "optim.blocks.0.ln_1.bias.step"} <= keys
    assert not any("head" in key for key in keys), "a tied head is stored once"
    model, tokenizer, config = load_model(checkpoint)
    assert (tokenizer.vocab_size, config.model.vocab_size) == (257, 257)
    assert next(model.parameters()).dtype == torch.float32


def test_metrics_and_plot(finished, tmp_path):
    row = train_rows(finished)[-1]
    assert set(row) >= {"loss", "grad_norm", "lr", "tokens", "data_hash", "tokens_per_s", "data_wait_share"}
    assert "mfu" not in row, "no peak rate is known for this device"
    plot_losses(finished, tmp_path / "loss.png", baseline=3.0)
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert any((finished / "tensorboard").iterdir())


def test_starting_a_finished_run_again_does_nothing(dataset, finished):
    before = losses(train_rows(finished))
    assert losses(run_tiny(dataset, finished)) == before


def start_and_kill(data, run, at_step: int) -> None:
    """Start a training process and kill -9 it once it has done `at_step` steps."""
    values = TINY | {"data": {"path": str(data)}, "run": TINY["run"] | {"dir": str(run)},
                     "train": TINY["train"] | {"steps": 40}, "checkpoint": {"every": 10},
                     "model": TINY["model"] | {"dropout": 0.1}}
    path = run.parent / "kill.yaml"
    path.write_text(config_module.to_yaml(config_module.from_dict(values, "test")))
    with (run.parent / "imports").open("w") as imports:
        process = subprocess.Popen([sys.executable, "-X", "importtime", "-m", "gptdist", "train", str(path)], cwd=ROOT,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=imports)
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and len(train_rows(run)) >= at_step):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL


def test_kill_9_and_resume_is_bitwise(dataset, tmp_path):
    """40 steps straight = killed after 20, continued from the newest checkpoint to 40: every loss bit for bit."""
    options = ["--train.steps=40", "--checkpoint.every=10", "--model.dropout=0.1"]
    straight = run_tiny(dataset, tmp_path / "straight", *options)
    start_and_kill(dataset, tmp_path / "killed", 20)
    killed_at = train_rows(tmp_path / "killed")[-1]["step"]
    assert killed_at < 40, "the kill came too late to prove anything"
    assert losses(run_tiny(dataset, tmp_path / "killed", *options)) == losses(straight)
    imports = (tmp_path / "imports").read_text()
    assert "gptdist.trainer" in imports
    assert "torch._dynamo" not in imports, "a second or more of each start, for torch.compile, which is not used"


def test_workers_and_micro_batches_change_nothing(dataset, tmp_path):
    one = run_tiny(dataset, tmp_path / "a", "--train.micro_batch=11", "--data.workers=0", "--model.dropout=0.1")
    other = run_tiny(dataset, tmp_path / "b", "--train.micro_batch=3", "--data.workers=3", "--model.dropout=0.1")
    assert_same_curve(other, one)


def test_sigterm_saves_and_asks_to_be_requeued(dataset, tmp_path):
    config = tiny_config(dataset, tmp_path / "run", "--checkpoint.every=0", "--eval.every=0")
    trainer = Trainer(config, init_world(config.parallel))
    trainer.stop.received = True
    assert trainer.run() == EXIT_REQUEUE
    assert layout.latest(tmp_path / "run" / "checkpoints").name == "step-00000001"
    straight = run_tiny(dataset, tmp_path / "straight", "--eval.every=0")
    assert losses(run_tiny(dataset, tmp_path / "run", "--eval.every=0")) == losses(straight)


@contextlib.contextmanager
def sigint_is(handler):
    """As the run's parent would leave it: a shell ignores it for what it starts in the background."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)


def interrupting(config, steps: int) -> Trainer:
    """A trainer that gets SIGINT, as from Ctrl-C, before each of the first `steps` steps."""
    trainer = Trainer(config, init_world(config.parallel))
    take = trainer._step

    def step(batch):
        if batch.step < steps:
            os.kill(os.getpid(), signal.SIGINT)
        return take(batch)

    trainer._step = step
    return trainer


def test_ctrl_c_saves(dataset, tmp_path, capfd):
    config = tiny_config(dataset, tmp_path / "run", "--checkpoint.every=0", "--eval.every=0")
    with sigint_is(signal.default_int_handler):
        assert interrupting(config, 1).run() == EXIT_REQUEUE
    assert "Ctrl-C again stops now" in capfd.readouterr().err
    assert layout.latest(tmp_path / "run" / "checkpoints").name == "step-00000001"


def test_a_second_ctrl_c_interrupts(dataset, tmp_path, capfd):
    config = tiny_config(dataset, tmp_path / "run", "--checkpoint.every=0", "--eval.every=0")
    trainer = interrupting(config, 1)
    trainer.task.started = lambda strategy: os.kill(os.getpid(), signal.SIGINT)
    with sigint_is(signal.default_int_handler), pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert capfd.readouterr().err.count("Ctrl-C again stops now") == 1
    assert layout.latest(tmp_path / "run" / "checkpoints") is None


def test_sigint_stays_ignored_where_the_parent_ignores_it(dataset, tmp_path):
    config = tiny_config(dataset, tmp_path / "run", "--train.stop_at=1")
    with sigint_is(signal.SIG_IGN):
        assert interrupting(config, 1).run() == 0


def test_init_from_takes_weights_only(dataset, finished, tmp_path):
    rows = run_tiny(dataset, tmp_path / "next", f"--checkpoint.init_from={finished}", "--train.stop_at=1",
                    "--schedule.warmup_steps=0")
    assert rows[0]["step"] == 1
    assert rows[0]["loss"] < train_rows(finished)[0]["loss"] - 1.0
    state = store.load_tensors(layout.latest(tmp_path / "next" / "checkpoints"), ["optim.wte.weight.step"])
    assert state["optim.wte.weight.step"].item() == 1


def test_resume_falls_back_when_the_newest_checkpoint_is_altered(dataset, finished, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    newest = layout.latest(run / "checkpoints")
    shard = newest / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    rows = run_tiny(dataset, run, "--eval.every=5", "--checkpoint.every=5")
    assert losses(rows) == losses(train_rows(finished))
    assert [p.name[:20] for p in (run / "checkpoints").glob("damaged-*")] == ["damaged-step-0000002"]


@pytest.mark.parametrize(("name", "damage", "said"), [
    ("shard-00000.safetensors", lambda path: os.truncate(path, path.stat().st_size - 1), "safetensors has "),
    ("MANIFEST.json", lambda path: path.unlink(), "MANIFEST.json: No such file")])
def test_resume_falls_back_when_a_file_of_the_newest_checkpoint_is_cut_short_or_gone(
        dataset, finished, tmp_path, capsys, name, damage, said):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    damage(layout.latest(run / "checkpoints") / name)
    rows = run_tiny(dataset, run, "--eval.every=5", "--checkpoint.every=5")
    assert losses(rows) == losses(train_rows(finished))
    told = capsys.readouterr().out
    assert "damaged checkpoint moved to" in told
    assert said in told
    assert "step-00000015 (step 15)" in told


def test_skipped_samples_are_not_seen(dataset, tmp_path):
    plain = run_tiny(dataset, tmp_path / "a", "--train.stop_at=2")
    skipped = run_tiny(dataset, tmp_path / "b", "--train.stop_at=1", "--data.skip=[[0,11]]")
    assert skipped[0]["data_hash"] == plain[1]["data_hash"]


def test_a_gradient_that_is_not_finite_is_skipped_then_fatal(dataset, tmp_path, monkeypatch):
    config = tiny_config(dataset, tmp_path / "run", "--train.max_bad_steps=3")
    trainer = Trainer(config, init_world(config.parallel))
    loss = trainer.task.loss
    monkeypatch.setattr(trainer.task, "loss", lambda *args: loss(*args) * float("nan"))
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row up to step 3.*lower optim\.lr"):
        trainer.run()


def test_an_evaluation_that_is_not_finite_is_said(dataset, tmp_path, monkeypatch, capsys):
    """Its row is written and printed; it is never the best, and the next finite one is."""
    config = tiny_config(dataset, tmp_path / "run", "--train.steps=3", "--schedule.warmup_steps=0", "--eval.every=1",
                         "--checkpoint.keep_last=1")
    trainer = Trainer(config, init_world(config.parallel))
    found = iter([float("nan"), 2.0, float("inf")])
    monkeypatch.setattr(trainer.task, "evaluate", lambda strategy: {"val_loss": next(found), "other": 0.5})
    assert trainer.run() == 0
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "eval"]
    assert [(row["step"], row["val_loss"], row["other"]) for row in rows] == [(1, None, 0.5), (2, 2.0, 0.5),
                                                                              (3, None, 0.5)]
    said = capsys.readouterr().out
    for line in ("step 1  validation loss nan (not finite)  other 0.5000", "step 2  validation loss 2.0000 (best)",
                 "step 3  validation loss inf (not finite)"):
        assert line in said
    kept = [layout.read_train_state(path) for path in layout.scan(tmp_path / "run" / "checkpoints")[0]]
    assert [(state["step"], state["val_loss"], state["best_val_loss"]) for state in kept] == [(2, 2.0, 2.0),
                                                                                               (3, None, 2.0)]


def test_loss_is_divided_by_the_number_of_targets(dataset, tmp_path):
    """Two micro-batches, one with almost no targets: gradients equal those of the plain mean over all targets."""
    config = tiny_config(dataset, tmp_path / "run")
    trainer = Trainer(config, init_world(config.parallel))
    from gptdist.model import build_meta
    from gptdist.optim.adamw import build_adamw

    trainer.strategy.prepare(build_meta(trainer.config.model), lambda named: build_adamw(named, config.optim))
    source: PretrainSource = trainer.task.source
    batch = source.step(0, 0).micro_batches[0]
    targets = batch.targets.clone()
    targets[0, 2:] = -100
    n = int((targets >= 0).sum())
    for row in (0, 1):
        with trainer.strategy.micro_batch(is_last=row == 1):
            losses = trainer.strategy(batch.tokens[row:row + 1], targets[row:row + 1])
            trainer.strategy.backward(losses.sum(), n)
    summed = {name: p.grad.clone() for name, p in trainer.strategy.model.named_parameters()}
    trainer.strategy.discard()
    (trainer.strategy.model(batch.tokens[:2], targets[:2]).sum() / n).backward()
    for name, p in trainer.strategy.model.named_parameters():
        assert torch.allclose(p.grad, summed[name], atol=1e-7), name


@pytest.mark.parametrize(("overrides", "message"), [
    (["--checkpoint.resume=never"], "already has step-00000020, but checkpoint.resume=never"),
    (["--checkpoint.resume=nowhere"], "nowhere is not a directory"),
    (["--model.width=64"], "has model.width=32, this run model.width=64"),
    (["--model.tied=false"], "has model.tied=True, this run model.tied=False"),
    (["--model.n_heads=8"], "has model.n_heads=4, this run model.n_heads=8"),
    (["--model.n_layers=1"], "has model.n_layers=2"),
    (["--model.positions=rope"], "has model.positions=learned"),
    (["--run.seed=5"], "has run.seed=1337, this run run.seed=5: a run keeps its data"),
    (["--data.shuffle=false"], "has data.shuffle=True"),
    (["--model.vocab_size=100"], "model.vocab_size=100 is below the tokenizer's 257 ids"),
])
def test_bad_starts_of_an_existing_run(dataset, finished, overrides, message):
    before = sorted(p.name for p in (finished / "checkpoints").iterdir())
    with pytest.raises(UserError) as caught:
        run_tiny(dataset, finished, "--train.steps=21", *overrides)
    assert message in str(caught.value)
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == before


@pytest.mark.parametrize(("overrides", "message"), [
    (["--data.path=nowhere"], "data.path=nowhere does not exist"),
    (["--data.path="], "data.path is empty"),
    (["--model.context=1048576", "--train.tokens_per_step=1048576"], "expected at least model.context + 1 = 1048577"),
    (["--parallel.device=cuda"], "torch sees no GPU"),
])
def test_bad_starts(dataset, tmp_path, overrides, message):
    from gptdist.errors import MissingError

    if "cuda" in message and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises((UserError, MissingError)) as caught:
        run_tiny(dataset, tmp_path / "run", *overrides)
    assert message in str(caught.value)


def test_run_dir_that_cannot_be_written(dataset, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write to run\.dir=.*choose a writable directory"):
        run_tiny(dataset, tmp_path / "file" / "run")


def test_another_tokenizer_is_refused(dataset, finished, tmp_path):
    from gptdist.data.prepare import PrepareConfig, prepare

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n\n" * 400)
    prepare(PrepareConfig(inputs=[str(text)], output=str(tmp_path / "bpe"), tokenizer="bpe:258", dedup=False,
                          val_fraction=0.0, document_separator="blank-line", workers=1))
    with pytest.raises(UserError, match=r"was trained with tokenizer .* but .* was prepared with"):
        run_tiny(tmp_path / "bpe", finished, "--train.steps=21")


def test_disk_full_while_saving_leaves_the_last_checkpoint(dataset, tmp_path, monkeypatch):
    import errno

    from gptdist.checkpoint import files

    run = tmp_path / "run"
    run_tiny(dataset, run, "--train.stop_at=5")
    monkeypatch.setattr(files.os, "write", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(UserError, match="No space left"):
        run_tiny(dataset, run)
    monkeypatch.undo()
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000005"]
    assert_same_curve(run_tiny(dataset, run), run_tiny(dataset, tmp_path / "straight"))


def test_exit_record_tells_the_code(dataset, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "gptdist", "train", "configs/quickstart.yaml", "--data.path=nowhere",
         f"--run.dir={tmp_path / 'run'}"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    record = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (record["code"], record["rank"]) == (2, 0)
    assert "nowhere does not exist" in record["message"]


def test_metrics_of_a_killed_write_are_readable(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1, "loss": 2.0}\n{"kind": "train", "st')
    assert [row["step"] for row in read_rows(path)] == [1]


@pytest.mark.long
def test_compiled_training_gives_the_same_curve(dataset, tmp_path):
    plain = run_tiny(dataset, tmp_path / "plain", "--model.dropout=0.1")
    compiled = run_tiny(dataset, tmp_path / "compiled", "--model.dropout=0.1", "--train.compile=true")
    assert_same_curve(compiled, plain)


def test_resuming_on_other_data_is_refused(dataset, finished, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    meta = other / "train" / "meta.json"
    meta.write_text(meta.read_text() + " ")
    with pytest.raises(UserError, match=r"was trained on other data than .*other/train"):
        run_tiny(other, finished, "--train.steps=21")


def test_initialising_another_model_is_refused(dataset, finished, tmp_path):
    with pytest.raises(UserError, match=r"has model\.n_layers=2, this run model\.n_layers=1"):
        run_tiny(dataset, tmp_path / "next", f"--checkpoint.init_from={finished}", "--model.n_layers=1")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(dataset, tmp_path):
    run = tmp_path / "run"
    run_tiny(dataset, run, "--train.stop_at=3")
    shard = layout.latest(run / "checkpoints") / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    rows = train_rows(run)
    for _ in range(2):
        with pytest.raises(UserError, match="has only damaged checkpoints, such as damaged-step-00000003"):
            run_tiny(dataset, run)
    assert train_rows(run) == rows


def test_checkpoints_that_cannot_be_read_just_now_are_left_alone(dataset, finished, monkeypatch):
    names = sorted(p.name for p in (finished / "checkpoints").iterdir())
    monkeypatch.setattr(layout, "hash_file", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error", "x")))
    with pytest.raises(UserError, match="cannot read x: Input/output error"):
        run_tiny(dataset, finished, "--train.steps=21")
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == names


def test_an_error_on_one_rank_is_the_error_of_the_run(dataset, tmp_path):
    """Rank 1 meets a bad token id; rank 0 only loses its connection. exit.json and stderr tell of rank 1's."""
    import shutil

    import numpy as np

    from tests.conftest import torchrun

    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    shard = data / "train" / "shard-00000.tokens.bin"
    tokens = np.fromfile(shard, np.uint16)
    tokens[6 * 32 + 5] = 60000  # without shuffling: the seventh of eleven windows of the first step, which rank 1 reads
    tokens.tofile(shard)
    config = tmp_path / "run.yaml"
    config.write_text(config_module.to_yaml(tiny_config(data, tmp_path / "run", "--data.shuffle=false")))
    done = torchrun(2, "-m", "gptdist", "train", str(config))
    assert done.returncode != 0
    record = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (record["code"], record["rank"]) == (2, 1)
    assert "token id 60000 is beyond the vocabulary" in record["message"]
    assert "gptdist train [rank 1]: " in done.stderr
    assert "gloo" not in done.stderr, "the other rank's lost connection is not shown"


def test_two_runs_in_one_directory_are_refused(dataset, tmp_path):
    from gptdist.faults import lock_run_dir

    (tmp_path / "run").mkdir()
    with lock_run_dir(tmp_path / "run"), pytest.raises(UserError, match=r"another process is training in run\.dir="):
        run_tiny(dataset, tmp_path / "run")
    assert run_tiny(dataset, tmp_path / "run", "--train.stop_at=1")
