"""The training loop, one for every task and strategy.

A task (tasks/task.py) gives batches, a loss per micro-batch and an evaluation; a strategy spreads the model; this
module steps, measures, evaluates, saves and resumes. Which tokens a step sees is a function of `next_sample` alone, so
a run continues exactly.
"""

import contextlib
import dataclasses
import json
import math
import socket
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from gptdist.checkpoint import layout, store
from gptdist.checkpoint.base import BASE_NAME, find_base, not_in_base
from gptdist.checkpoint.files import user_errors
from gptdist.checkpoint.ranks import Ranks
from gptdist.checkpoint.restore import load_state
from gptdist.checkpoint.saver import Saver
from gptdist.config import Config, to_dict, to_yaml
from gptdist.data.loader import Prefetcher, StepBatch
from gptdist.data.prepare import prepare_input
from gptdist.errors import EXIT_DONE, EXIT_REQUEUE, DamagedError, UserError
from gptdist.evaluate.items import TaskSet
from gptdist.evaluate.scorer import Scorer
from gptdist.evaluate.suite import Asked, Options, main_metrics, open_tasks, run_task
from gptdist.faults import StopSignal, clear_exit_record, heartbeat, lock_run_dir
from gptdist.faults.bad_steps import NOT_FINITE, describe_nonfinite, describe_spike, fault_of, remember
from gptdist.metrics import Metrics, flops_per_token, peak_flops
from gptdist.optim.build import build_optimizer
from gptdist.optim.schedule import lr_factor
from gptdist.parallel.rank_times import RankTimes
from gptdist.parallel.replicas import check_replicas
from gptdist.parallel.strategies import make_strategy
from gptdist.parallel.world import World
from gptdist.profiling import StepProfiler
from gptdist.tasks import make_task
from gptdist.tasks.task import check_resumed

TRAIN_STATE_FORMAT = 1
OPTIONAL = {"bad_steps", "recent", "left_out"}


@dataclasses.dataclass
class TrainState:
    """What continues a run besides the tensors: independent of the number of processes."""

    step: int = 0  # optimizer steps done
    next_sample: int = 0  # number of the first sample of the next step
    tokens: int = 0  # target tokens seen
    val_loss: float | None = None  # validation loss of exactly these weights, if evaluated
    best_val_loss: float | None = None
    dataset: str | None = None  # identifies the samples seen (Task.dataset_at); None: not trained here yet
    format: int = TRAIN_STATE_FORMAT
    # Stored only where they are not the default, so that a run without bad steps has the file it always had.
    bad_steps: int = 0  # skipped in a row up to here
    recent: list[list[float]] = dataclasses.field(default_factory=list)  # (loss, norm) of the last steps taken
    left_out: list[list[int]] = dataclasses.field(default_factory=list)  # [start, stop) of samples left by rewinds

    def encode(self) -> bytes:
        """train_state.json."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({name: v for name, v in values.items() if v or name not in OPTIONAL}).encode()

    @classmethod
    def read(cls, checkpoint: Path) -> "TrainState":
        values = layout.read_train_state(checkpoint)
        if values.get("format") != TRAIN_STATE_FORMAT:
            raise UserError(f"{checkpoint}: train_state.json has format {values.get('format')}, this version reads "
                            f"{TRAIN_STATE_FORMAT}: use a newer gptdist")
        names = {field.name for field in dataclasses.fields(cls)}
        if not names - OPTIONAL <= set(values) <= names:
            raise UserError(f"{checkpoint}: train_state.json has keys {sorted(values)}, expected {sorted(names)}")
        for field in dataclasses.fields(cls):
            if field.name not in values or field.name in OPTIONAL:
                continue
            value = values[field.name]
            if not isinstance(value, (int, float, type(None)) if "float" in str(field.type) else field.type):
                raise UserError(f"{checkpoint}: train_state.json has {field.name}={str(value)[:40]!r}, expected "
                                f"{field.type}: use another checkpoint")
        return cls(**values)


class Trainer:
    """One process's part of a run. `run()` returns the exit code."""

    def __init__(self, config: Config, world: World, beat: heartbeat.Heartbeat | None = None):
        self.world, self.beat = world, beat or heartbeat.Heartbeat(world.rank)
        self.ranks = Ranks(None)
        if config.data.input:
            self.ranks.on_coordinator(lambda: prepare_input(config.data))
        self.task = self.ranks.on_all(lambda: make_task(config, world))
        self._check_same_data()
        self.config = self.task.config
        self.run_dir = Path(config.run.dir)
        self.root = self.run_dir / "checkpoints"
        self.state = TrainState(dataset=self.task.dataset_at(0))
        self.stop = StopSignal(announce=world.is_main)
        self.strategy = self.ranks.on_all(lambda: make_strategy(world, self.config))
        self.tasks = self.ranks.on_all(self._open_tasks)
        self.console = Console(quiet=not world.is_main, highlight=False, soft_wrap=True)
        self._rewinds: dict[int, int] = {}  # by the step of the checkpoint

    def _check_same_data(self) -> None:
        """Raise UserError where another rank read other data, such as a file on its node's own disk."""
        ours = self.task.dataset_id, self.task.tokenizer.hash
        theirs = self.ranks.on_coordinator(lambda: ours)

        def check() -> None:
            if ours != theirs:
                raise UserError(f"rank {self.world.rank} read other data or another tokenizer than rank 0 from "
                                f"{self.task.data_name} (hashes {ours[0][:12]} and {ours[1][:12]}, rank 0: "
                                f"{theirs[0][:12]} and {theirs[1][:12]}): give every node the same files")

        self.ranks.on_all(check)

    def _open_tasks(self) -> list[TaskSet]:
        """eval.tasks. Raises UserError now for what could not be asked later."""
        tasks = open_tasks(self.config.eval.tasks)
        for task in tasks:
            Asked(Scorer(self.strategy, self.task.tokenizer), task, self._task_options())
        return tasks

    def _task_options(self) -> Options:
        """Items that do not fit the context are left out: a run should not end for them."""
        return Options(shots=self.config.eval.tasks_shots, limit=self.config.eval.tasks_limit, skip_bad=True)

    def run(self) -> int:
        with contextlib.ExitStack() as self.held:
            return self._run()

    def _run(self) -> int:
        self.ranks.on_coordinator(self._open_run_dir)
        if self.beat.start:
            self.beat.open(self.run_dir)
        self.stop.install()
        self.held.callback(self.stop.restore_interrupt)
        self.beat.enter("verify")
        source = self._choose_start()
        self.beat.enter("build")
        model = self.task.build()
        self._n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.strategy.prepare(model, lambda parameters: build_optimizer(parameters, self.strategy.config))
        self.strategy.on_call = self.beat.tick
        self.beat.enter("load")
        self._restore(source)
        self.beat.step = self.state.step
        self.base = self.ranks.on_coordinator(lambda: find_base(self.config, source))
        self._announce(source)
        self.task.step = self.state.step
        self.beat.enter("prepare")
        self.task.started(self.strategy)
        if self.state.step >= self.config.train.last_step:
            self.console.print(f"nothing to do: {self.state.step} of {self.config.train.last_step} steps are done")
            self._finish()
            return EXIT_DONE
        self.metrics = None
        self.ranks.on_coordinator(self._open_metrics)
        keep = self.config.checkpoint
        try:
            with Saver(self.root, keep_last=keep.keep_last, keep_best=keep.keep_best,
                       timeout_s=self.config.parallel.timeout_s, note=self.beat.save_phase) as self.saver:
                code = self._loop()
            self._finish()
            return code
        finally:
            if self.metrics is not None:
                self.metrics.close()

    def _finish(self) -> None:
        self.beat.enter("finish")
        if self.state.step == self.config.train.steps:
            self.task.finished(self.strategy)

    # Start

    def _open_run_dir(self) -> None:
        """Make the run directory and clear what dead runs left. On the main rank."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.held.enter_context(lock_run_dir(self.run_dir))
            clear_exit_record(self.run_dir)
            heartbeat.clear(self.run_dir, self.beat.start)
        except OSError as error:
            reason = "it is a file" if self.run_dir.is_file() else error.strerror
            raise UserError(f"cannot write to run.dir={self.run_dir}: {reason}: choose a writable directory") from error
        layout.clean_stale(self.root)

    def _open_metrics(self) -> None:
        with user_errors("write to"):
            (self.run_dir / "config.yaml").write_text(to_yaml(self.config))
        self.metrics = Metrics(self.run_dir, self.config.run, start_step=self.state.step, resolved=to_dict(self.config))

    def _choose_start(self) -> tuple[str, Path] | None:
        """("resume" | "init", verified checkpoint), or None for a fresh run.

        Resuming automatically, a checkpoint whose checksums are wrong is set aside and the one before it taken.
        """
        while True:
            source = self.ranks.on_coordinator(self._find_start)
            if source is None or not self.config.checkpoint.verify:
                return source
            automatic = source[0] == "resume" and self.config.checkpoint.resume == "auto"
            if self._is_good(source[1], or_raise=not automatic):
                return source

    def _is_good(self, path: Path, *, or_raise: bool) -> bool:
        """Whether a checkpoint's checksums are right. If not it is set aside, or its DamagedError raised."""
        try:
            store.verify_together(path)
            return True
        except DamagedError as error:
            if or_raise:
                raise
            reason = str(error)
            self.ranks.on_coordinator(lambda: self._set_aside(path, reason))
            return False

    def _find_start(self) -> tuple[str, Path] | None:
        """What to start from, and nothing of the run directory in the way of it. On the main rank."""
        options = self.config.checkpoint
        complete, damaged = layout.scan(self.root)
        for path, reason in damaged:
            if not layout.is_damaged(path):
                raise UserError(reason)
            self._set_aside(path, reason)
        if options.resume == "never" and complete:
            raise UserError(f"run.dir={self.run_dir} already has {complete[-1].name}, but checkpoint.resume=never: "
                            f"choose another run.dir, or resume=auto")
        if options.resume not in ("auto", "never"):
            chosen = layout.resolve(options.resume)
            self._refuse_later(chosen, complete)
            return "resume", chosen
        if complete:
            return "resume", complete[-1]
        if lost := sorted(self.root.glob("damaged-*")):
            raise UserError(f"run.dir={self.run_dir} has only damaged checkpoints, such as {lost[-1].name}: repair one "
                            f"and give it its step-* name back, or choose another run.dir to start afresh")
        return ("init", layout.resolve(options.init_from)) if options.init_from else None

    def _refuse_later(self, chosen: Path, complete: list[Path]) -> None:
        """Going back in a run would meet its own later checkpoints, which are never overwritten."""
        if complete and layout.step_of(complete[-1]) > layout.complete(chosen).step:
            raise UserError(f"run.dir={self.run_dir} has {complete[-1].name}, later than checkpoint.resume={chosen}: "
                            f"choose another run.dir, or remove the later checkpoints")

    def _set_aside(self, path: Path, reason: str) -> None:
        aside = layout.set_aside(path)
        self.console.print(f"damaged checkpoint moved to {aside}: {reason}")

    def _restore(self, source: tuple[str, Path] | None) -> None:
        if source is None:
            return
        kind, path = source
        if kind == "init":
            self.ranks.on_all(lambda: self.task.check_base(path))
            self.task.load_base(path, self.strategy.model_state())
            self.strategy.loaded()
            return
        state = self.ranks.on_all(lambda: self._resumable(path))
        load_state(path, self.strategy.state())
        self.strategy.loaded()
        self.task.resumed(path)
        self.state = state

    def _resumable(self, checkpoint: Path) -> TrainState:
        state = TrainState.read(checkpoint)
        check_resumed(self.task, checkpoint, state.dataset, state.next_sample)
        return state

    def _announce(self, source: tuple[str, Path] | None) -> None:
        config, world = self.config, self.world
        n, unit = self.strategy.n_parameters, self.task.unit
        trained = "" if self._n_trained == n else f" ({self._n_trained:,} trained)"
        batch = f"{config.sequences_per_step} {unit}"
        if not config.is_finetuning:
            batch = f"{config.sequences_per_step} x {config.model.context} tokens"
        tensor = f" x tensor parallel {config.parallel.tensor}" if config.parallel.tensor > 1 else ""
        start = "fresh start" if source is None else f"{source[0]} from {source[1]} (step {self.state.step})"
        self.console.print(
            f"{n / 1e6:.2f}M parameters{trained}, vocabulary {config.model.vocab_size}; {world.strategy}{tensor} on "
            f"{world.size} x {world.device.type}, {self.strategy.config.train.precision}; {batch} per step; "
            f"{self.task.source.n_samples} {unit} per epoch; {start}")
        if config.train.replica_check_every and not self.strategy.replicas():
            self.console.print(f"train.replica_check_every: ranks hold nothing alike under {world.strategy}, so "
                               f"nothing is checked")
        self._flops_per_token = flops_per_token(config.model, n)

    # Steps

    def _loop(self) -> int:
        with self._progress() as progress:
            bar = progress.add_task("train", total=self.config.train.steps, completed=self.state.step, note="")
            code = None
            while code is None:
                code = self._steps(progress, bar)
        if code == EXIT_REQUEUE:
            self.console.print(f"stopped by a signal at step {self.state.step}, checkpoint saved: start again to go on")
        return code

    def _steps(self, progress: Progress, bar: int) -> int | None:
        """Steps until the run's last, or a signal's; returns the exit code, or None where the run went back."""
        code = EXIT_DONE
        with Prefetcher(self.task.source, step=self.state.step, next_sample=self.state.next_sample,
                        workers=self.config.data.workers) as batches:
            waited = 0.0
            self.rank_times = RankTimes(self.world)
            profiler = StepProfiler(self.config.profile, self.run_dir, self.world.rank, self.world.device)
            self.beat.enter("data")
            for batch in batches:
                profiler.before(batch.step + 1)
                started = time.perf_counter()
                row = self._step(batch)
                self.rank_times.end_step(batches.wait_s)
                row["data_wait_share"] = (batches.wait_s - waited) / (
                    time.perf_counter() - started + batches.wait_s - waited)
                waited = batches.wait_s
                stopping = row.pop("stop") > 0
                self.beat.stepped_to(self.state.step)
                self.beat.enter("report")
                self._report(row, progress, bar)
                self._note_files(profiler.after(self.state.step))
                if self._policy(row.get("skipped")) == "rewind":
                    self._rewind(row)
                    code = EXIT_REQUEUE if stopping else None
                    break
                self._evaluate_and_save(stopping)
                self.rank_times.pause()
                if self.state.step == self.config.train.last_step:
                    break
                if stopping:
                    code = EXIT_REQUEUE
                    break
                self.beat.enter("data")
            self._note_files(profiler.finish(self.state.step))
        return code

    def _step(self, batch: StepBatch) -> dict[str, Any]:
        """One optimizer step; returns its metrics row."""
        started, config = time.perf_counter(), self.config
        self.beat.enter("counts")
        counts = torch.tensor([batch.n_targets, batch.data_hash, self.stop.received, batch.n_tokens, batch.n_positions,
                               self.saver.failed], dtype=torch.int64)
        with self.rank_times.synchronising():
            n_targets, data_hash, stop, n_tokens, n_positions, save_failed = self.world.sum(counts).tolist()
        if save_failed:
            self.saver.settle()
        key = self.task.dropout_key(batch.step)
        loss_sum = torch.zeros((), dtype=torch.float64)
        for i, micro_batch in enumerate(batch.micro_batches):
            self.beat.enter("forward")
            with self.strategy.micro_batch(is_last=i == len(batch.micro_batches) - 1):
                loss = self.task.loss(self.strategy, micro_batch, key)
                self.beat.enter("backward")
                self.strategy.backward(loss, n_targets)
            loss_sum += loss.detach().double().cpu()
        self.beat.enter("norm")
        norm = self.strategy.grad_norm().item()
        self.beat.enter("loss")
        sums = self.world.sum(torch.stack([loss_sum, torch.tensor(norm, dtype=torch.float64)])).tolist()
        loss, mean_norm = sums[0] / max(n_targets, 1), sums[1] / self.world.dp_size
        fault = fault_of(loss, mean_norm, self.state.recent, config.train)  # of sums: the same on every rank
        self.beat.enter("update")
        lr = config.optim.lr * lr_factor(batch.step, config.train.steps, config.schedule)
        if fault is None:
            self.strategy.apply(lr, config.train.grad_clip)
        else:
            self._discard(batch.step, fault, loss_sum, loss, norm)
        next_sample = self.task.source.advance(self.state.next_sample)
        recent = self.state.recent if fault else remember(self.state.recent, loss, mean_norm, config.train)
        self.state = dataclasses.replace(
            self.state, step=batch.step + 1, next_sample=next_sample, tokens=self.state.tokens + n_targets,
            val_loss=None, dataset=self.task.dataset_at(next_sample), recent=recent,
            bad_steps=self.state.bad_steps + 1 if fault else 0)
        seconds = time.perf_counter() - started
        row = {"loss": loss, "grad_norm": norm, "lr": lr, "tokens": n_targets, "data_hash": data_hash,
               "tokens_per_s": (n_tokens or n_targets) / seconds, "stop": stop}
        if fault is not None:
            row["skipped"] = fault
        return row | self.task.measured() | ({"padding_share": 1 - n_tokens / n_positions} if n_tokens else {})

    # Steps that are not taken

    def _policy(self, fault: str | None) -> str | None:
        """What the configuration does about a fault: skip, rewind or stop."""
        if fault is None:
            return None
        return self.config.train.on_nonfinite if fault == NOT_FINITE else self.config.train.on_spike

    def _discard(self, step: int, fault: str, loss_sum: Tensor, loss: float, norm: float) -> None:
        """Drop the step's gradient and say why. Raises UserError where the run is to stop for it."""
        why = (self._nonfinite(loss_sum, loss, norm) if fault == NOT_FINITE
               else describe_spike(loss, norm, self.state.recent))
        self.strategy.discard()
        policy, in_a_row = self._policy(fault), self.state.bad_steps + 1
        if policy == "stop":
            raise UserError(f"step {step + 1}: {why}; train.on_{'nonfinite' if fault == NOT_FINITE else 'spike'}=stop: "
                            f"lower optim.lr, or leave samples out with data.skip; the last checkpoint is as it was",
                            agreed=True)
        self.console.print(f"step {step + 1}: {why}; this step is skipped")
        if policy == "skip" and in_a_row >= self.config.train.max_bad_steps:
            what = "gradient was not finite" if fault == NOT_FINITE else "steps were no good, the last one a spike,"
            raise UserError(f"the {what} in {in_a_row} steps in a row up to step {step + 1}: lower optim.lr, or leave "
                            f"samples out with data.skip; resume from an earlier checkpoint", agreed=True)

    def _nonfinite(self, loss_sum: Tensor, loss: float, norm: float) -> str:
        """What is not finite where; a collective call."""
        ours = (socket.gethostname(), bool(loss_sum.isfinite()), self.strategy.bad_gradients(),
                self.strategy.bad_weights())
        names = [key.removeprefix("model.") for key in self.strategy.model_state()]
        return describe_nonfinite(loss, norm, self.ranks.gather(ours), names)

    def _rewind(self, row: dict[str, Any]) -> None:
        """Go back to the newest checkpoint, and on from there with the samples after the step of this row.

        Raises UserError where there is no checkpoint, or after train.max_bad_steps times to the same.
        """
        self.beat.enter("rewind")
        bad = self.state
        self.saver.settle()
        path = self.ranks.on_coordinator(lambda: layout.latest(self.root))
        while path is not None and not self._is_good(path, or_raise=False):
            path = self.ranks.on_coordinator(lambda: layout.latest(self.root))
        if path is None:
            raise UserError(f"step {bad.step} is no good ({row['skipped']}) and there is no checkpoint to go back to: "
                            f"lower optim.lr, or checkpoint.every", agreed=True)
        step, most = layout.step_of(path), self.config.train.max_bad_steps
        if self._rewinds.get(step, 0) == most:
            raise UserError(f"step {bad.step} is no good ({row['skipped']}) after the run went back to {path} {most} "
                            f"times: lower optim.lr; resume from an earlier checkpoint", agreed=True)
        self._rewinds[step] = self._rewinds.get(step, 0) + 1
        load_state(path, self.strategy.state())
        self.strategy.loaded()
        good = self.ranks.on_all(lambda: TrainState.read(path))
        left = [good.next_sample, bad.next_sample]
        self.state = dataclasses.replace(good, next_sample=bad.next_sample, left_out=[*good.left_out, left],
                                         dataset=self.task.dataset_at(bad.next_sample))
        self.beat.step = self.state.step
        self.task.rewound(self.state.step)
        if self.metrics is not None:
            self.metrics.rewind(self.state.step)
            # With the number of the step that comes next: a run resumed from this checkpoint drops it and comes to the
            # same again.
            self.metrics.write("rewind", self.state.step + 1, from_step=bad.step, samples_left_out=left,
                               reason=row["skipped"], loss=row["loss"], grad_norm=row["grad_norm"])
        self.console.print(f"back from step {bad.step} to {path.name}; samples {left[0]} to {left[1] - 1} are left out")

    def _report(self, row: dict, progress: Progress, bar: int) -> None:
        step = self.state.step
        peak = peak_flops(torch.cuda.get_device_name(self.world.device)) if self.world.device.type == "cuda" else None
        if peak is not None:
            row["mfu"] = row["tokens_per_s"] * self._flops_per_token / (peak * self.world.size)
        if self.metrics is not None:
            self.metrics.write("train", step, **row)
        note = f"loss {row['loss']:.4f}  norm {row['grad_norm']:.2f}  {row['tokens_per_s']:,.0f} tokens/s"
        progress.update(bar, completed=step, note=note)
        due = step % self.config.run.log_every == 0 or step == self.config.train.last_step
        if due and (times := self.rank_times.row()) and self.metrics is not None:
            self.metrics.write("ranks", step, **times)
        if due and not self.console.is_terminal:
            self.console.print(f"step {step}  {note}  lr {row['lr']:.2e}")

    def _note_files(self, written: list[Path]) -> None:
        for path in written:
            self.console.print(f"profile: {path}")

    def _evaluate_and_save(self, stopping: bool) -> None:
        step, config = self.state.step, self.config
        last = step == config.train.last_step
        is_best = False
        if config.train.replica_check_every and step % config.train.replica_check_every == 0:
            self._check_replicas()
        if last or (config.eval.every and step % config.eval.every == 0):
            self.beat.enter("evaluate")
            is_best = self._evaluate()
        due = last or stopping or (config.checkpoint.every and step % config.checkpoint.every == 0)
        if due or (is_best and config.checkpoint.keep_best):
            self.save(background=config.checkpoint.asynchronous and not (last or stopping))
        if self.tasks and (last or (config.eval.tasks_every and step % config.eval.tasks_every == 0)):
            self.beat.enter("tasks")
            self._run_tasks()

    def _check_replicas(self) -> None:
        """Raises ReplicaError."""
        self.beat.enter("replicas")
        check_replicas(self.strategy, self.state.step)

    def _evaluate(self) -> bool:
        """Validation loss into state, all that the task measures into metrics; True if that loss is the lowest yet."""
        started = time.perf_counter()
        self.task.step = self.state.step
        values = self.task.evaluate(self.strategy)
        if values is None:
            return False
        loss, best = values["val_loss"], self.state.best_val_loss
        finite = math.isfinite(loss)
        is_best = finite and (best is None or loss < best)
        if finite:
            self.state.val_loss, self.state.best_val_loss = loss, loss if is_best else best
        if self.metrics is not None:
            self.metrics.write("eval", self.state.step, **values, seconds=time.perf_counter() - started)
        others = "".join(f"  {name} {value:.4f}" for name, value in values.items()
                         if name != "val_loss" and isinstance(value, float))
        remark = " (best)" if is_best else "" if finite else " (not finite)"
        self.console.print(f"step {self.state.step}  validation loss {loss:.4f}{remark}{others}")
        return is_best

    def _run_tasks(self) -> None:
        """The figures of eval.tasks into metrics, a row for all of them."""
        started, options = time.perf_counter(), self._task_options()
        scorer = Scorer(self.strategy, self.task.tokenizer)
        values = {}
        for task in self.tasks:
            values |= main_metrics(run_task(scorer, task, options))
        if self.metrics is not None:
            self.metrics.write("tasks", self.state.step, **values, seconds=time.perf_counter() - started)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.console.print(f"step {self.state.step}  {shown}")

    def save(self, *, background: bool = False) -> None:
        """Save a checkpoint of the current step, then drop those that retention does not keep."""
        every = self.config.train.replica_check_every
        if every and self.state.step % every:
            self._check_replicas()  # no checkpoint of values that are known to be wrong
        self.beat.enter("save")
        files = {"train_state.json": self.state.encode(),
                 "config.yaml": to_yaml(self.config).encode()}
        files |= {f"tokenizer/{name}": data for name, data in self.task.tokenizer.files().items()}
        files |= self.task.files()
        tensors = self.strategy.state()
        if self.base is not None:
            tensors = not_in_base(tensors, self.base.shapes)
            files[BASE_NAME] = self.base.reference
        self.saver.save(self.state.step, tensors, files if self.world.is_main else {}, background=background)

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   TextColumn("{task.fields[note]}"))
        return Progress(*columns, console=self.console, disable=not (self.world.is_main and self.console.is_terminal))
