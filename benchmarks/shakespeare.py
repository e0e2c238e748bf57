"""How long a GPT of characters takes to a given loss on Tiny Shakespeare.

    python -m benchmarks.shakespeare [--data FILE] [--only NAME ...] [--trials] [--output FILE.md] [--work DIR]

FILE (default: tinyshakespeare.txt in the directory GPTDIST_DATA of the environment) is the text. Each recipe is one
`gptdist train` in a process of its own with configs/shakespeare-char.yaml and the overrides of the table. Its seconds
are of the wall, from the process's start to its end, with the preparation of the data and the evaluation; its loss is
over the whole held-out text, the last len - int(0.9 len) characters, in windows of the model's context that do not
overlap. --trials also runs variants of the fast recipe, one change each: what helped and what did not. The exit code is
1 where a recipe misses its target.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tokenize import describe
from gptdist.metrics import read_rows
from gptdist.tasks.pretrain import open_data

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/shakespeare-char.yaml"
LONG = ("--model.n_layers=4", "--model.width=192", "--model.n_heads=6", "--model.context=128",
        "--train.tokens_per_step=2048", "--train.steps=1400", "--schedule.warmup_steps=50",
        "--optim.momentum=0.95", "--optim.newton_schulz_steps=5")


@dataclass(frozen=True)
class Recipe:
    """Overrides of CONFIG, and what they are to reach."""

    overrides: tuple[str, ...]
    target_s: float
    target_loss: float


RECIPES = {"fast": Recipe((), 38, 1.88), "long": Recipe(LONG, 600, 1.60)}
# Variants of the fast recipe, one change each.
TRIALS = {
    "AdamW in place of Muon": ("--optim.name=adamw", "--optim.beta2=0.99"),
    "momentum 0.95": ("--optim.momentum=0.95",),
    "3 iterations of Newton and Schulz": ("--optim.newton_schulz_steps=3",),
    "5 iterations of Newton and Schulz": ("--optim.newton_schulz_steps=5",),
    "Muon's learning rate 0.02": ("--optim.muon_lr=0.02",),
    "Muon's learning rate 0.1": ("--optim.muon_lr=0.1",),
    "AdamW's learning rate 0.01": ("--optim.lr=0.01",),
    "learned positions": ("--model.positions=learned",),
    "context 128": ("--model.context=128",),
    "cosine schedule to 0.1": ("--schedule.name=cosine", "--schedule.min_ratio=0.1"),
    "twice the batch, half the steps": ("--train.tokens_per_step={twice}", "--train.steps={half}"),
}


@dataclass(frozen=True)
class Result:
    seconds: float
    loss: float
    steps: int


def train(data: Path, folder: Path, overrides: tuple[str, ...]) -> Result:
    """One run from raw text, in a process of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "gptdist", "train", CONFIG, f"--data.input={data}", f"--data.path={folder}/data",
               f"--run.dir={folder}/run", *overrides]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"shakespeare: {' '.join(command)} failed:\n{done.stderr[-3000:]}")
    check_split(data, folder / "data")
    last = [row for row in read_rows(folder / "run" / "metrics.jsonl") if row["kind"] == "eval"][-1]
    return Result(seconds, last["val_loss"], last["step"])


def check_split(data: Path, prepared: Path) -> None:
    """The run trained on the first int(0.9 len) characters and was scored on the others."""
    text = data.read_text(encoding="utf-8")
    train_part, val, tokenizer = open_data(str(prepared))
    cut = int(0.9 * len(text))
    for dataset, part in ((train_part, text[:cut]), (val, text[cut:])):
        if tokenizer.decode(dataset.window(0, len(dataset)).tolist()) != part:
            raise SystemExit(f"shakespeare: {dataset.path} is not its part of {data}")


def table(results: dict[str, tuple[tuple[str, ...], Result]], targets: dict[str, Recipe]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| recipe | overrides | steps | seconds | validation loss | target |", "|---|---|---|---|---|---|"]
    for name, (overrides, result) in results.items():
        target = targets.get(name)
        wanted = "" if target is None else f"{target.target_loss:.2f} in {target.target_s:.0f} s"
        lines.append(f"| {name} | {' '.join(f'`{o}`' for o in overrides)} | {result.steps} | {result.seconds:.1f} | "
                     f"{result.loss:.4f} | {wanted} |")
    return lines


def filled(overrides: tuple[str, ...], steps: int, tokens: int) -> tuple[str, ...]:
    return tuple(o.format(twice=2 * tokens, half=steps // 2) for o in overrides)


def main() -> int:
    from gptdist import config as config_module

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("GPTDIST_DATA", "."), "tinyshakespeare.txt"))
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--trials", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", type=Path, help="keep data and runs here")
    args = parser.parse_args()
    if not args.data.is_file():
        parser.error(f"--data is {args.data}, expected the text file")
    fast = config_module.load(str(ROOT / CONFIG), []).train
    runs = {name: RECIPES[name].overrides for name in args.only}
    if args.trials:
        runs |= {name: filled(overrides, fast.steps, fast.tokens_per_step) for name, overrides in TRIALS.items()}
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        results = {}
        for number, (name, overrides) in enumerate(runs.items()):
            result = train(args.data.resolve(), (work / str(number)).resolve(), overrides)
            results[name] = overrides, result
            print(table({name: results[name]}, RECIPES)[-1], flush=True)
    text = "\n".join(["# Time to a loss: Tiny Shakespeare, characters", "",
                      f"{describe('benchmarks.shakespeare')}.", "", *table(results, RECIPES), "",
                      "nanoGPT, the CPU recipe of its README (4 layers, width 128, context 64, 2000 steps of batch "
                      "12), measured on 2 cores of another machine (Zen 5): 113 s, 1.898 on the whole "
                      "validation part.", ""])
    if args.output:
        args.output.write_text(text)
    missed = [name for name in args.only if results[name][1].seconds > RECIPES[name].target_s
              or results[name][1].loss > RECIPES[name].target_loss]
    print(f"missed: {', '.join(missed)}" if missed else "every target is reached")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
