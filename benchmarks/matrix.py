"""Every strategy and world size continues the run of every other: the largest difference of the loss from one process.

    python -m benchmarks.matrix [--strategies single fsdp zero3 ...] [--worlds 1 2 4] [--output FILE.md]

A tiny model with dropout and uneven shares trains 10 steps and saves under each setting (a row); each setting (a
column) then loads each of those checkpoints and trains 10 more. A cell is the largest |loss - loss of the uninterrupted
run in one process| over steps 11 to 20; `saved` is that over steps 1 to 10. Each world size is started twice: for all
saves, and for all loads. The exit code is 1 if a difference exceeds 1e-5.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tokenize import describe
from gptdist.checkpoint import layout
from gptdist.data.corpus import embedded_documents
from gptdist.data.prepare import PrepareConfig, prepare
from gptdist.parallel.world import end_process, env_world_size
from tests.training import run_tiny, train_rows

ROOT = Path(__file__).resolve().parent.parent
SAVE_AT, LAST = 10, 20
TOLERANCE = 1e-5
COMMON = ("--model.dropout=0.1", "--train.micro_batch=3", "--eval.every=0", "--eval.tokens=32")


@dataclass(frozen=True)
class Setting:
    """One way to run: `name` at `world` processes. Another kind of parallelism is one more line in KINDS."""

    name: str
    world: int

    def __str__(self) -> str:
        return f"{self.name}/{self.world}"


# name -> (overrides, world sizes it runs at)
KINDS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "single": (("--parallel.strategy=single",), (1,)),
    "fsdp": (("--parallel.strategy=fsdp",), (1, 2, 4)),
    "zero1": (("--parallel.strategy=zero1",), (1, 2, 4)),
    "zero2": (("--parallel.strategy=zero2",), (1, 2, 4)),
    "zero3": (("--parallel.strategy=zero3",), (1, 2, 4)),
    "tp2": (("--parallel.strategy=fsdp", "--parallel.tensor=2"), (2, 4)),  # at 4: x 2 FSDP shards
    "hsdp": (("--parallel.strategy=hsdp", "--parallel.replicas=2"), (2, 4)),
}
DEFAULT = ("single", "fsdp", "tp2", "zero1", "zero2", "zero3")


def settings(names: list[str], worlds: list[int]) -> list[Setting]:
    return [Setting(name, world) for name in names for world in KINDS[name][1] if world in worlds]


def saved_dir(out: Path, source: Setting) -> Path:
    return out / "saved" / f"{source.name}-{source.world}"


def cell_dir(out: Path, source: Setting, target: Setting) -> Path:
    return out / "cells" / f"{source.name}-{source.world}" / f"{target.name}-{target.world}"


def work(phase: str, data: Path, out: Path, everything: list[Setting]) -> None:
    """One rank's part of a phase: every setting of this world size."""
    for setting in everything:
        if setting.world != env_world_size():
            continue
        overrides = (*KINDS[setting.name][0], *COMMON)
        if phase == "save":
            run_tiny(data, saved_dir(out, setting), *overrides, f"--train.stop_at={SAVE_AT}")
            continue
        for source in everything:
            checkpoint = saved_dir(out, source) / "checkpoints" / layout.step_name(SAVE_AT)
            run_tiny(data, cell_dir(out, source, setting), *overrides, f"--checkpoint.resume={checkpoint}")


def launch(phase: str, world: int, data: Path, out: Path, options: argparse.Namespace) -> None:
    """Run a phase at one world size; its output is shown only if it fails."""
    print(f"{phase} at world size {world}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world),
               "-m", "benchmarks.matrix", "--phase", phase, "--data", str(data), "--out", str(out),
               "--strategies", *options.strategies, "--worlds", *map(str, options.worlds)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{phase} at world size {world} failed:\n{done.stderr[-4000:]}")


def difference(rows: list[dict], reference: list[dict], first: int, last: int) -> float:
    """Largest difference of the loss over steps [first, last]."""
    losses = {row["step"]: row["loss"] for row in rows}
    return max(abs(losses[row["step"]] - row["loss"]) for row in reference if first <= row["step"] <= last)


def table(out: Path, everything: list[Setting], reference: list[dict]) -> tuple[str, float]:
    """(Markdown, the largest number in it)."""
    lines = ["| saved by | saved | " + " | ".join(map(str, everything)) + " |", "|---" * (len(everything) + 2) + "|"]
    worst = 0.0
    for source in everything:
        cells = [difference(train_rows(saved_dir(out, source)), reference, 1, SAVE_AT)]
        for target in everything:
            cells.append(difference(train_rows(cell_dir(out, source, target)), reference, SAVE_AT + 1, LAST))
        worst = max(worst, *cells)
        lines.append(f"| {source} | " + " | ".join(f"{value:.1e}" for value in cells) + " |")
    return "\n".join(lines), worst


def small_dataset(folder: Path) -> Path:
    """English that comes with Python, as bytes."""
    text = folder / "text.txt"
    documents = [document for _, document in zip(range(40), embedded_documents(), strict=False)]
    text.write_text("\n<|endoftext|>\n".join(documents)[:120_000], encoding="utf-8")
    prepare(PrepareConfig(inputs=[str(text)], output=str(folder / "bytes"), tokenizer="bytes",
                          document_separator="<|endoftext|>", val_fraction=0.1, workers=1))
    return folder / "bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategies", nargs="+", choices=list(KINDS), default=list(DEFAULT))
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "matrix.md")
    parser.add_argument("--phase", choices=("save", "load"), help=argparse.SUPPRESS)  # in a worker
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    everything = settings(options.strategies, options.worlds)
    if options.phase:
        try:
            work(options.phase, options.data, options.out, everything)
        except BaseException:
            traceback.print_exc()
            end_process(1)
        end_process(0)
    with tempfile.TemporaryDirectory() as folder:
        out, data = Path(folder), small_dataset(Path(folder))
        run_tiny(data, out / "reference", *COMMON)
        for phase in ("save", "load"):
            for world in sorted({setting.world for setting in everything}):
                launch(phase, world, data, out, options)
        text, worst = table(out, everything, train_rows(out / "reference"))
    header = describe("benchmarks.matrix")
    report = f"# Resuming under another strategy and world size\n\n{__doc__.split(chr(10) * 2, 2)[2]}\n" \
             f"{header}\n\n{text}\n\nLargest: {worst:.1e}\n"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(report)
    print(report)
    sys.exit(int(worst > TOLERANCE))


if __name__ == "__main__":
    main()
