"""How the cost of a training step on a CPU grows with the context and with the width: speed and peak memory.

    python -m benchmarks.train_cpu_scale [--contexts 128 256 ...] [--widths 256 512 ...] [--output FILE.md]

Contexts: one sequence, width --width. Widths: one sequence of --context tokens. A GPT-2 of few layers (--layers,
--vocab; heads of 64), the contenders of benchmarks.train_cpu: this project's step and PyTorch's strongest, `hf tuned`,
in bf16 where the processor multiplies it, else in fp32. Contenders take turns, --rounds times at each size, each time
in a process of its own, whose peak memory is reported; it may take --limit-s seconds and the memory that is free, and
what does not fit is said. The output has a plot of each beside it, FILE-contexts.png and FILE-widths.png.
"""

import argparse
import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.tokenize import describe
from benchmarks.train_cpu import CONTENDERS, Shape, publish, run_contender
from gptdist.parallel.host import has_bf16

HEAD_DIM = 64
PRECISION = "bf16" if has_bf16(torch.device("cpu")) else "fp32"
DEFAULT_CONTENDERS = [f"gptdist {PRECISION}", f"hf tuned {PRECISION}"]


@dataclass(frozen=True)
class Point:
    """One contender at one size: median seconds of a step and peak memory; or why there are none."""

    tokens: int
    step_s: float | None = None
    peak_bytes: int = 0
    refusal: str = ""

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.step_s


def free_memory() -> int:
    """Bytes that processes may still take without swapping (Linux)."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def point(name: str, args: argparse.Namespace, context: int, width: int) -> Point:
    """Measure in a process that may take what memory is free, less a tenth."""
    shape = Shape(1, context)
    sizes = argparse.Namespace(steps=args.steps, warmup=1, layers=args.layers, width=width, heads=width // HEAD_DIM,
                               vocab=args.vocab)
    limit = free_memory() * 9 // 10
    try:
        found = run_contender(name, sizes, shape, timeout_s=args.limit_s,
                              before=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))
    except subprocess.TimeoutExpired:
        return Point(shape.tokens, refusal=f"takes more than {args.limit_s} s")
    except SystemExit as error:
        last = str(error).strip().splitlines()[-1]
        if not any(word in last.lower() for word in ("memory", "alloc")):
            raise
        return Point(shape.tokens, refusal=f"does not fit in {limit / 1e9:.0f} GB")
    return Point(shape.tokens, statistics.median(found["seconds"]), found["peak_bytes"])


def joined(rounds: list[Point]) -> Point:
    """The median of several rounds and the most memory, or what stopped one of them."""
    for found in rounds:
        if found.refusal:
            return found
    return Point(rounds[0].tokens, statistics.median(p.step_s for p in rounds), max(p.peak_bytes for p in rounds))


def sweep(args: argparse.Namespace, sizes: list[tuple[int, int]]) -> dict[str, list[Point]]:
    """Points of every contender at each (context, width)."""
    points: dict[str, list[Point]] = {name: [] for name in args.only}
    for context, width in sizes:
        rounds = [[point(name, args, context, width) for name in args.only] for _ in range(args.rounds)]
        for name, *of_one in zip(args.only, *rounds, strict=True):
            found = joined(of_one)
            said = found.refusal or f"{found.rate:.0f} tokens/s, {found.peak_bytes / 1e9:.2f} GB"
            print(f"T = {context}, C = {width}, {name}: {said}", file=sys.stderr)
            points[name].append(found)
    return points


def table(axis: str, values: list[int], points: dict[str, list[Point]]) -> list[str]:
    """A row for each value; the ratio is of the first contender's speed to the second's."""
    names = list(points)
    head = [axis, *(f"{name}, {unit}" for name in names for unit in ("tokens/s", "GB"))]
    if len(names) == 2:
        head.append("ratio")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for i, value in enumerate(values):
        found = [points[name][i] for name in names]
        cells = [str(value)]
        for p in found:
            cells += [p.refusal, ""] if p.refusal else [f"{p.rate:.0f}", f"{p.peak_bytes / 1e9:.2f}"]
        if len(names) == 2:
            cells.append("" if any(p.refusal for p in found) else f"{found[0].rate / found[1].rate:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def plot(axis: str, values: list[int], points: dict[str, list[Point]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for name, found in points.items():
        there = [(value, p) for value, p in zip(values, found, strict=True) if not p.refusal]
        at = [value for value, _ in there]
        speed.plot(at, [p.rate for _, p in there], marker="o", label=name)
        memory.plot(at, [p.peak_bytes / 1e9 for _, p in there], marker="o", label=name)
    for axes, label in ((speed, "tokens/s"), (memory, "peak memory, GB")):
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
        axes.set_xticks(values, [str(value) for value in values])
        axes.set_xticks([], minor=True)
        axes.grid(True, alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", nargs="*", type=int, default=[128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--widths", nargs="*", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--width", type=int, default=256, help="of the sweep over contexts")
    parser.add_argument("--context", type=int, default=256, help="of the sweep over widths")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process, after one that warms up")
    parser.add_argument("--rounds", type=int, default=3, help="of all contenders at each size")
    parser.add_argument("--limit-s", type=float, default=120, help="of each process")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=DEFAULT_CONTENDERS, metavar="NAME",
                        help=f"contenders: {', '.join(CONTENDERS)}")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    for width in (args.width, *args.widths):
        if width <= 0 or width % HEAD_DIM:
            parser.error(f"width {width} is no multiple of {HEAD_DIM}, a head's channels")
    lines = ["# How training on a CPU scales", "",
             f"{describe('benchmarks.train_cpu_scale')}. {args.layers} layers, heads of {HEAD_DIM}, vocabulary "
             f"{args.vocab}, one sequence; medians of {args.rounds} rounds, each of {args.steps} steps in a process "
             f"of its own; torch {torch.__version__}.", ""]
    sweeps = (("contexts", f"T, width {args.width}", args.contexts, [(value, args.width) for value in args.contexts]),
              ("widths", f"width, T = {args.context}", args.widths, [(args.context, value) for value in args.widths]))
    for kind, axis, values, sizes in sweeps:
        if not values:
            continue
        points = sweep(args, sizes)
        lines += [f"## {kind.capitalize()}", "", *table(axis, values, points)]
        if args.output:
            picture = args.output.with_name(f"{args.output.stem}-{kind}.png")
            plot(axis, values, points, picture)
            lines += [f"![{kind}]({picture.name})", ""]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
