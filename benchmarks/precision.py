"""The loss curve of training in bf16 beside that in fp32, and beside another fp32 run's.

    python -m benchmarks.precision --data DIR [--config FILE] [--steps N] [--output FILE.md]

DIR is a dataset of `gptdist prepare` for the configuration (default: configs/quickstart.yaml, whose first lines say
how to make it). Three runs: fp32, bf16 from the same weights on the same data in the same order, and fp32 with another
seed, the measure of chance. Compared are means over 50 steps, and the validation losses. The exit code is 1 where a
mean of bf16 is further than BAND from fp32's.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.tokenize import describe
from gptdist.metrics import read_rows

ROOT = Path(__file__).resolve().parent.parent
BAND = 0.02  # nats per token
WINDOW = 50
RUNS = {"fp32": ("fp32", 0), "bf16": ("bf16", 0), "fp32, another seed": ("fp32", 1)}


def train(config: Path, data: Path, folder: Path, precision: str, seed: int, steps: int) -> list[dict]:
    """The rows of one run's metrics.jsonl."""
    overrides = {"data.path": data, "run.dir": folder, "run.seed": seed, "run.log_every": 1, "run.tensorboard": False,
                 "train.precision": precision, "train.steps": steps, "eval.every": steps, "checkpoint.every": 0,
                 "parallel.strategy": "single"}
    command = [sys.executable, "-m", "gptdist", "train", str(config), *(f"--{k}={v}" for k, v in overrides.items())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"precision: {' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return list(read_rows(folder / "metrics.jsonl"))


def means(rows: list[dict]) -> list[float]:
    """Training losses, each window's mean."""
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    return [statistics.mean(losses[start : start + WINDOW]) for start in range(0, len(losses), WINDOW)]


def validation(rows: list[dict]) -> float:
    return [row["val_loss"] for row in rows if row["kind"] == "eval"][-1]


def table(runs: dict[str, list[dict]]) -> tuple[list[str], float]:
    """Lines of Markdown, and the largest distance of bf16's means from fp32's."""
    curves = {name: means(rows) for name, rows in runs.items()}
    lines = ["| steps | fp32 | bf16 - fp32 | another seed - fp32 |", "|---|---|---|---|"]
    for number, (fp32, bf16, other) in enumerate(zip(*curves.values(), strict=True)):
        steps = f"{number * WINDOW + 1} to {(number + 1) * WINDOW}"
        lines.append(f"| {steps} | {fp32:.4f} | {bf16 - fp32:+.4f} | {other - fp32:+.4f} |")
    fp32, bf16, other = (validation(rows) for rows in runs.values())
    lines.append(f"| validation at the end | {fp32:.4f} | {bf16 - fp32:+.4f} | {other - fp32:+.4f} |")
    return lines, max(abs(b - a) for a, b in zip(curves["fp32"], curves["bf16"], strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: train(args.config, args.data.resolve(), Path(folder) / str(number), precision, seed, args.steps)
                for number, (name, (precision, seed)) in enumerate(RUNS.items())}
    lines, worst = table(runs)
    verdict = "within" if worst <= BAND else "OUTSIDE"
    text = "\n".join(["# Training in bf16 beside fp32", "",
                      f"{describe('benchmarks.precision')}. {args.config.name}, {args.steps} steps; nats per token, "
                      f"means of {WINDOW} steps. Largest distance {worst:.4f}, {verdict} the band of {BAND}.", "",
                      *lines, ""])
    print(text)
    if args.output:
        args.output.write_text(text)
    return 0 if worst <= BAND else 1


if __name__ == "__main__":
    sys.exit(main())
