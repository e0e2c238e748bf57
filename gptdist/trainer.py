"""The training loop, one for every task and strategy.

A task (tasks/task.py) gives batches, a loss per micro-batch and an evaluation; a strategy spreads the model; this
module steps, measures, evaluates, saves and resumes. Which tokens a step sees is a function of `next_sample` alone, so
a run continues exactly.
"""

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
from gptdist.faults import StopSignal, clear_exit_record, lock_run_dir
from gptdist.metrics import Metrics, flops_per_token, peak_flops
from gptdist.optim.build import build_optimizer
from gptdist.optim.schedule import lr_factor
from gptdist.parallel.rank_times import RankTimes
from gptdist.parallel.strategies import make_strategy
from gptdist.parallel.world import World
from gptdist.profiling import StepProfiler
from gptdist.tasks import make_task
from gptdist.tasks.task import check_resumed

TRAIN_STATE_FORMAT = 1


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

    @classmethod
    def read(cls, checkpoint: Path) -> "TrainState":
        values = layout.read_train_state(checkpoint)
        if values.get("format") != TRAIN_STATE_FORMAT:
            raise UserError(f"{checkpoint}: train_state.json has format {values.get('format')}, this version reads "
                            f"{TRAIN_STATE_FORMAT}: use a newer gptdist")
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise UserError(f"{checkpoint}: train_state.json has keys {sorted(values)}, expected {sorted(names)}")
        for field in dataclasses.fields(cls):
            value = values[field.name]
            if not isinstance(value, (int, float, type(None)) if "float" in str(field.type) else field.type):
                raise UserError(f"{checkpoint}: train_state.json has {field.name}={str(value)[:40]!r}, expected "
                                f"{field.type}: use another checkpoint")
        return cls(**values)


class Trainer:
    """One process's part of a run. `run()` returns the exit code."""

    def __init__(self, config: Config, world: World):
        self.world = world
        self.ranks = Ranks(None)
        if config.data.input:
            self.ranks.on_coordinator(lambda: prepare_input(config.data))
        self.task = self.ranks.on_all(lambda: make_task(config, world))
        self._check_same_data()
        self.config = self.task.config
        self.run_dir = Path(config.run.dir)
        self.root = self.run_dir / "checkpoints"
        self.state = TrainState(dataset=self.task.dataset_at(0))
        self.stop = StopSignal()
        self.strategy = self.ranks.on_all(lambda: make_strategy(world, self.config))
        self.tasks = self.ranks.on_all(self._open_tasks)
        self.console = Console(quiet=not world.is_main, highlight=False, soft_wrap=True)
        self._bad_steps = 0

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
        self.stop.install()
        source = self._choose_start()
        model = self.task.build()
        self._n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.strategy.prepare(model, lambda parameters: build_optimizer(parameters, self.strategy.config))
        self._restore(source)
        self.base = self.ranks.on_coordinator(lambda: find_base(self.config, source))
        self._announce(source)
        self.task.step = self.state.step
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
                       timeout_s=self.config.parallel.timeout_s) as self.saver:
                code = self._loop()
            self._finish()
            return code
        finally:
            if self.metrics is not None:
                self.metrics.close()

    def _finish(self) -> None:
        if self.state.step == self.config.train.steps:
            self.task.finished(self.strategy)

    # Start

    def _open_run_dir(self) -> None:
        """Make the run directory and clear what dead runs left. On the main rank."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.held.enter_context(lock_run_dir(self.run_dir))
            clear_exit_record(self.run_dir)
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
            try:
                store.verify_together(source[1])
                return source
            except DamagedError as error:
                if source[0] != "resume" or self.config.checkpoint.resume != "auto":
                    raise
                reason = str(error)
                self.ranks.on_coordinator(lambda path=source[1], reason=reason: self._set_aside(path, reason))

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
        self._flops_per_token = flops_per_token(config.model, n)

    # Steps

    def _loop(self) -> int:
        steps = self.config.train.steps
        code = EXIT_DONE
        with self._progress() as progress, Prefetcher(
                self.task.source, step=self.state.step, next_sample=self.state.next_sample,
                workers=self.config.data.workers) as batches:
            bar = progress.add_task("train", total=steps, completed=self.state.step, note="")
            waited = 0.0
            self.rank_times = RankTimes(self.world)
            profiler = StepProfiler(self.config.profile, self.run_dir, self.world.rank, self.world.device)
            for batch in batches:
                profiler.before(batch.step + 1)
                started = time.perf_counter()
                row = self._step(batch)
                self.rank_times.end_step(batches.wait_s)
                row["data_wait_share"] = (batches.wait_s - waited) / (
                    time.perf_counter() - started + batches.wait_s - waited)
                waited = batches.wait_s
                stopping = row.pop("stop") > 0
                self._report(row, progress, bar)
                self._note_files(profiler.after(self.state.step))
                self._evaluate_and_save(stopping)
                self.rank_times.pause()
                if self.state.step == self.config.train.last_step:
                    break
                if stopping:
                    code = EXIT_REQUEUE
                    break
            self._note_files(profiler.finish(self.state.step))
        if code == EXIT_REQUEUE:
            self.console.print(f"stopped by a signal at step {self.state.step}, checkpoint saved: start again to go on")
        return code

    def _step(self, batch: StepBatch) -> dict[str, float | int]:
        """One optimizer step; returns its metrics row."""
        started, config = time.perf_counter(), self.config
        counts = torch.tensor([batch.n_targets, batch.data_hash, self.stop.received, batch.n_tokens, batch.n_positions,
                               self.saver.failed], dtype=torch.int64)
        with self.rank_times.synchronising():
            n_targets, data_hash, stop, n_tokens, n_positions, save_failed = self.world.sum(counts).tolist()
        if save_failed:
            self.saver.settle()
        key = self.task.dropout_key(batch.step)
        loss_sum = torch.zeros((), dtype=torch.float64)
        for i, micro_batch in enumerate(batch.micro_batches):
            with self.strategy.micro_batch(is_last=i == len(batch.micro_batches) - 1):
                loss = self.task.loss(self.strategy, micro_batch, key)
                self.strategy.backward(loss, n_targets)
            loss_sum += loss.detach().double().cpu()
        norm = self.strategy.grad_norm().item()
        lr = config.optim.lr * lr_factor(batch.step, config.train.steps, config.schedule)
        self._apply_or_discard(batch.step, norm, lr)
        loss = self.world.sum(loss_sum).item() / max(n_targets, 1)
        next_sample = self.task.source.advance(self.state.next_sample)
        self.state = TrainState(
            step=batch.step + 1, next_sample=next_sample,
            tokens=self.state.tokens + n_targets, best_val_loss=self.state.best_val_loss,
            dataset=self.task.dataset_at(next_sample))
        seconds = time.perf_counter() - started
        row = {"loss": loss, "grad_norm": norm, "lr": lr, "tokens": n_targets, "data_hash": data_hash,
               "tokens_per_s": (n_tokens or n_targets) / seconds, "stop": stop}
        return row | self.task.measured() | ({"padding_share": 1 - n_tokens / n_positions} if n_tokens else {})

    def _apply_or_discard(self, step: int, norm: float, lr: float) -> None:
        if math.isfinite(norm):
            self._bad_steps = 0
            self.strategy.apply(lr, self.config.train.grad_clip)
            return
        self.strategy.discard()
        self._bad_steps += 1
        self.console.print(f"step {step + 1}: the gradient is not finite ({norm}); this step is skipped")
        if self._bad_steps >= self.config.train.max_bad_steps:
            raise UserError(f"the gradient was not finite in {self._bad_steps} steps in a row up to step {step + 1}: "
                            f"lower optim.lr, or leave samples out with data.skip; resume from an earlier checkpoint",
                            agreed=True)

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
        if last or (config.eval.every and step % config.eval.every == 0):
            is_best = self._evaluate()
        due = last or stopping or (config.checkpoint.every and step % config.checkpoint.every == 0)
        if due or (is_best and config.checkpoint.keep_best):
            self.save(background=config.checkpoint.asynchronous and not (last or stopping))
        if self.tasks and (last or (config.eval.tasks_every and step % config.eval.tasks_every == 0)):
            self._run_tasks()

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
        files = {"train_state.json": json.dumps(dataclasses.asdict(self.state)).encode(),
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
