"""A rank of a training job is killed with -9 again and again: it has to end with the weights of an undisturbed one.

    python -m benchmarks.chaos [--kills 20] [--strategy fsdp zero1 zero2 zero3] [--seed 0] [--output FILE.md]

A tiny model with dropout trains on two processes under `torchrun --max-restarts`, saving in the background every 5
steps. The order of the phases to hit, the steps, delays and ranks are drawn from --seed. A rank's heartbeat file says
where it is, and when it has been killed where it was: that counts as hit, and a phase that was missed is aimed at
again. `rename` is the coordinator's, between the manifest and the directory's fsync; `save` is any other part of a
save, `start-up` anything before the first step. Checked after each kill: the job goes on from the last complete
checkpoint. At the end: every tensor of the last checkpoint and every row's loss, gradient norm and data are bit for bit
those of a run that was not disturbed. The exit code is 1 if anything differs.
"""

import argparse
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.matrix import small_dataset
from benchmarks.tokenize import describe
from gptdist import config as config_module
from gptdist.checkpoint import layout, store
from gptdist.faults.heartbeat import FOLDER, Beat, Heartbeat, read_beat
from tests.training import tiny_config, train_rows

ROOT = Path(__file__).resolve().parent.parent
STRATEGIES = ("fsdp", "zero1", "zero2", "zero3")
PHASES = ("step", "save", "rename", "start-up")
START_UP = ("start-up", "verify", "build", "load", "prepare")
SAVE_EVERY = 5
STEPS_PER_KILL = 16  # more than a run gets on between two kills, unless a phase is missed time and again
WAIT_S = 300.0  # on a busy machine a start may take a minute
POLL_S = 0.0002


@dataclass(frozen=True)
class Kill:
    aimed: str
    hit: str
    rank: int
    phase: str  # as the heartbeat had it
    lost: int  # steps done before that had to be done again
    resume_s: float  # from the kill to the end of the first step after it; nan: the next kill came before


@dataclass
class Outcome:
    strategy: str
    steps: int
    seconds: float = 0.0
    restarts: int = 0
    kills: list[Kill] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # what was not as promised


def write_config(data: Path, run: Path, strategy: str, steps: int) -> Path:
    path = run.with_suffix(".yaml")
    path.write_text(config_module.to_yaml(tiny_config(
        data, run, f"--parallel.strategy={strategy}", f"--train.steps={steps}", f"--checkpoint.every={SAVE_EVERY}",
        "--model.dropout=0.1", "--model.n_layers=1", "--train.micro_batch=6", "--eval.every=0", "--eval.tokens=32",
        f"--run.log_every={steps}")))
    return path


class Torchrun(subprocess.Popen):
    """The job. TORCHDYNAMO_DISABLE: DeepSpeed compiles its Muon at import, 2 s in every process. The other: torch 2.13
    keeps the workers' store for the next start, whose workers then read the addresses of the dead ones in it."""

    LONGEST_START_S = 4.0  # of the delay of a kill that is to hit the start; longer than a start takes is a miss

    def __init__(self, config: Path, log: Path, max_restarts: int):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                   f"--max-restarts={max_restarts}", "-m", "gptdist", "train", str(config)]
        with log.open("w") as out:
            super().__init__(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
                                               "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})

    @staticmethod
    def rank_of(pid: int) -> int | None:
        """The rank that torchrun gave a worker; None: it is another process, or has only begun."""
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return None
        ranks = [int(one[5:]) for one in environment if one.startswith(b"RANK=")]
        return ranks[0] if ranks else None


def undisturbed(data: Path, out: Path, strategy: str, steps: int) -> Path:
    """The run directory of a run that nothing happens to."""
    run = out / f"{strategy}-undisturbed"
    job = Torchrun(write_config(data, run, strategy, steps), out / f"{run.name}.log", 0)
    if job.wait(timeout=WAIT_S + steps):
        raise RuntimeError((out / f"{run.name}.log").read_text()[-3000:])
    return run


class Job:
    """A job under attack."""

    def __init__(self, launcher: type[Torchrun], data: Path, out: Path, strategy: str, steps: int, max_restarts: int):
        self.run = out / f"{strategy}-killed"
        self.log = out / f"{self.run.name}.log"
        self.agent = launcher(write_config(data, self.run, strategy, steps), self.log, max_restarts)
        self.dead: set[int] = set()  # processes of starts that are over

    def workers(self) -> dict[int, int]:
        """rank -> pid, of the processes of the start that is up, as far as they are there yet."""
        found = {}
        for pid in children(self.agent.pid):
            if pid not in self.dead and (rank := self.agent.rank_of(pid)) is not None:
                found[rank] = pid
        return found

    def beat(self, rank: int) -> Beat | None:
        """The rank's last beat, if the process is of the start that is up."""
        beat = read_beat(self.run / FOLDER / f"rank-{rank}.json")
        return beat if beat is not None and beat.pid not in self.dead else None

    def resumes(self) -> list[int]:
        """The step each start so far began at, of those that came to say it."""
        said = re.findall(r"per epoch; (?:fresh start|resume from \S+ \(step (\d+)\))", self.log.read_text())
        return [int(step or 0) for step in said]

    def wait(self, done: Callable[[], object], what: str) -> float:
        """Poll until `done`; the time then."""
        deadline = time.monotonic() + WAIT_S
        while not done():
            if self.agent.poll() is not None:
                raise RuntimeError(f"the job ended, waiting for {what}: {self.log.read_text()[-3000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{WAIT_S} s passed, waiting for {what}: {self.log.read_text()[-3000:]}")
            time.sleep(POLL_S)
        return time.monotonic()

    def kill(self, pid: int) -> tuple[float, Beat | None]:
        """Kill a rank: (when, its last beat if it had one)."""
        at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        self.wait(lambda: not alive(pid), "a killed process to die")
        beats = [self.beat(rank) for rank in range(2)]
        return at, next((beat for beat in beats if beat is not None and beat.pid == pid), None)

    def stop(self) -> None:
        if self.agent.poll() is None:
            os.killpg(self.agent.pid, signal.SIGKILL)
        for pid in self.workers().values():
            os.kill(pid, signal.SIGKILL)
        self.agent.wait()


def attack(job: Job, kills: int, seed: int, outcome: Outcome) -> None:
    """Kill until each phase had its share of `kills` hits, and there were as many in all."""
    chance = random.Random(seed)
    todo = [PHASES[i % len(PHASES)] for i in range(kills)]
    chance.shuffle(todo)
    while todo:
        aimed = todo.pop(0)
        kill = one_kill(job, aimed, chance, outcome, start_up_next=(todo or [aimed])[0] == "start-up")
        outcome.kills.append(kill)
        print(f"{outcome.strategy}: aimed at {aimed}, {kill}", file=sys.stderr, flush=True)
        if kill.hit != aimed:
            todo.append(aimed)
        if len(outcome.kills) > 4 * kills + 8:
            raise RuntimeError(f"{len(outcome.kills)} kills, and these are not hit yet: {todo}")


def one_kill(job: Job, aimed: str, chance: random.Random, outcome: Outcome, start_up_next: bool) -> Kill:
    """start_up_next: the new start is to be hit next, so that nothing is waited for."""
    job.wait(lambda: len(job.workers()) == 2, "two workers")
    workers = job.workers()
    rank = 0 if aimed == "rename" else chance.randrange(2)
    if aimed == "start-up":
        time.sleep(chance.uniform(0, job.agent.LONGEST_START_S))
    else:
        steps = chance.randint(1, 8) if aimed == "step" else 0
        first: list[int] = []

        def arrived() -> bool:
            beat = job.beat(rank)
            if beat is None or beat.phase in START_UP:
                return False
            first.append(beat.step)
            return beat.step >= first[0] + steps and where(beat) == aimed

        job.wait(arrived, f"rank {rank} to be in {aimed}")
    at, beat = job.kill(workers[rank])
    job.wait(lambda: not any(map(alive, workers.values())), "the other rank to end")
    job.dead |= set(workers.values())
    said = len(job.resumes())
    saved = layout.latest(job.run / "checkpoints")
    step = 0 if saved is None else layout.step_of(saved)
    job.wait(lambda: len(job.workers()) == 2, "two new workers")
    outcome.restarts += 1
    hit = where(beat)
    lost = max(0, beat.step - step) if beat is not None and hit != "start-up" else 0
    if start_up_next:
        return Kill(aimed, hit, rank, said_phase(beat), lost, math.nan)
    job.wait(lambda: len(job.resumes()) > said, "the new start to say where it begins")
    if job.resumes()[-1] != step:
        outcome.faults.append(f"went on from step {job.resumes()[-1]}, but the last complete checkpoint is {step}")
    back = job.wait(lambda: (new := job.beat(0)) is not None and new.step > step, "a step")
    return Kill(aimed, hit, rank, said_phase(beat), lost, back - at)


def where(beat: Beat | None) -> str:
    """One of PHASES."""
    if beat is None or beat.phase in START_UP:
        return "start-up"
    if beat.saving:
        return "rename" if beat.saving == "rename" else "save"
    return "save" if beat.phase == "save" else "step"


def said_phase(beat: Beat | None) -> str:
    if beat is None:
        return "before it met the others"
    return f"{beat.phase} + {beat.saving} of a save" if beat.saving else beat.phase


def run(strategy: str, data: Path, out: Path, *, kills: int, seed: int = 0, reference: Path | None = None,
        launcher: type[Torchrun] = Torchrun) -> Outcome:
    """Attack a job and compare what it leaves. reference: the directory of an undisturbed run of steps_of(kills)."""
    outcome = Outcome(strategy, steps_of(kills))
    if reference is None:
        reference = undisturbed(data, out, strategy, outcome.steps)
    began = time.monotonic()
    job = Job(launcher, data, out, strategy, outcome.steps, max_restarts=5 * kills + 9)
    try:
        attack(job, kills, seed, outcome)
        code = job.agent.wait(timeout=WAIT_S + outcome.steps)
        if code:
            outcome.faults.append(f"torchrun ended with {code}: {job.log.read_text()[-2000:]}")
    finally:
        job.stop()
    outcome.seconds = time.monotonic() - began
    outcome.faults += differences(reference, job.run)
    return outcome


def steps_of(kills: int) -> int:
    return STEPS_PER_KILL * (kills + 1)


def differences(reference: Path, run: Path) -> Iterator[str]:
    """What of a run's end is not bit for bit what it is in the reference."""
    ours, theirs = (layout.latest(path / "checkpoints") for path in (run, reference))
    if ours is None or ours.name != theirs.name:
        yield f"the last checkpoint is {ours}, not {theirs.name}"
        return
    values, wanted = store.load_tensors(ours), store.load_tensors(theirs)
    if values.keys() != wanted.keys():
        yield "the checkpoints have other tensors"
    for key, tensor in wanted.items():
        if not torch.equal(values[key], tensor):
            yield f"{key} differs by {(values[key] - tensor).abs().max()}"
    if layout.read_train_state(ours) != layout.read_train_state(theirs):
        yield "train_state.json differs"
    names = ("step", "loss", "grad_norm", "data_hash", "tokens")
    rows, expected = ([[row[name] for name in names] for row in train_rows(path)] for path in (run, reference))
    if rows != expected:
        yield "the rows of metrics.jsonl differ"
    if left := [path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("step-")]:
        yield f"left in checkpoints/: {left}"


# Processes

def children(pid: int) -> list[int]:
    try:
        tasks = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [int(child) for text in tasks for child in text.split()]


def alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# What a beat costs

def beat_seconds(folder: Path, n: int = 20_000) -> float:
    """Processor time of one beat, into a file in `folder`."""
    beat = Heartbeat()
    beat.open(folder)
    started = time.process_time()
    for _ in range(n):
        beat.enter("forward")
    seconds = (time.process_time() - started) / n
    beat.close()
    return seconds


def cost_line(reference: Path, folder: Path) -> str:
    rows = train_rows(reference)
    step_s = statistics.quantiles([row["tokens"] / row["tokens_per_s"] for row in rows], n=20)[0]
    beats = read_beat(reference / FOLDER / "rank-0.json").beat / len(rows)
    seconds = beat_seconds(folder)
    return (f"A beat takes {seconds * 1e6:.1f} us of the processor; {beats:.1f} of them in a step of {step_s * 1e3:.1f}"
            f" ms (a twentieth of this tiny model's steps were faster) are {beats * seconds / step_s:.2%} of it.")


def table(outcomes: list[Outcome]) -> str:
    lines = ["| strategy | steps | kills | step | save | rename | start-up | restarts | lost steps, mean and most | "
             "seconds to resume, median and most | end |", "|---" * 11 + "|"]
    for one in outcomes:
        hits, lost = Counter(kill.hit for kill in one.kills), [kill.lost for kill in one.kills]
        times = [kill.resume_s for kill in one.kills if not math.isnan(kill.resume_s)]
        counts = " | ".join(str(hits[phase]) for phase in PHASES)
        resumed = f"{statistics.median(times):.1f}, {max(times):.1f}" if times else ""
        lines.append(f"| {one.strategy} | {one.steps} | {len(one.kills)} | {counts} | {one.restarts} | "
                     f"{statistics.mean(lost):.1f}, {max(lost)} | {resumed} | "
                     f"{'; '.join(one.faults) or 'the same bits'} |")
    where_hit = Counter(kill.phase for one in outcomes for kill in one.kills)
    return "\n".join([*lines, "", "Where the killed ranks were: "
                      + ", ".join(f"{phase} {n}" for phase, n in where_hit.most_common()) + "."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--strategy", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "chaos.md")
    options = parser.parse_args()
    outcomes, cost = [], ""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        data = small_dataset(out)
        for strategy in options.strategy:
            reference = undisturbed(data, out, strategy, steps_of(options.kills))
            cost = cost or cost_line(reference, out)
            outcomes.append(run(strategy, data, out, kills=options.kills, seed=options.seed, reference=reference))
            print(table(outcomes), file=sys.stderr, flush=True)
    explained = __doc__.split("\n\n", 2)[2]
    report = (f"# Killing ranks at random\n\n{explained}\n{describe('benchmarks.chaos')}; torch {torch.__version__}\n\n"
              f"{table(outcomes)}\n\n{cost}\n")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(report)
    print(report)
    sys.exit(int(any(one.faults for one in outcomes)))


if __name__ == "__main__":
    main()
