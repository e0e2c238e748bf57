"""A scaling study by the planner's formulas: to 10,000 GPUs, weakly and strongly.

    python -m benchmarks.plan_scaling [--output benchmarks/results]

Weak: 8,192 tokens of every GPU and step. Strong: 16.8 million tokens a step, however many GPUs. Writes scaling.md and
scaling.png. What a run loses to failures is by Daly (2006): intervals between checkpoints of sqrt(2 d M), for a save
that stops training d seconds and failures M seconds apart.
"""

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from gptdist.config import Config, ModelConfig, ParallelConfig, TrainConfig
from gptdist.errors import UserError
from gptdist.plan import Plan, make_plan
from gptdist.plan.devices import find_device

SHAPE = dict(context=4096, vocab_size=50257, positions="rope", tied=False, bias=False)
MODELS = {"7B": ModelConfig(width=4096, n_layers=32, n_heads=32, **SHAPE),
          "70B": ModelConfig(width=8192, n_layers=80, n_heads=64, n_kv_heads=8, mlp_ratio=5.25, **SHAPE)}
WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 10000)
STRONG_TOKENS = 4096 * 4096
WEAK_SEQUENCES = 2  # per GPU and step
COPY_RANKS = 64  # hsdp: GPUs that share a copy of the model
LAYOUTS = {
    "fsdp": ParallelConfig(strategy="fsdp"),
    "hsdp, a copy on 64": ParallelConfig(strategy="hsdp"),
    "fsdp x tensor 8": ParallelConfig(strategy="fsdp", tensor=8),
    "zero1": ParallelConfig(strategy="zero1"),
}
DEVICE = "h100-80gb"
# 419 unexpected interruptions of 16,384 H100s in 54 days: Grattafiori et al., "The Llama 3 herd of models" (2024,
# arXiv 2407.21783), section 3.3.4, Table 5.
DEVICE_HOURS_BETWEEN_FAILURES = 54 * 24 * 16384 / 419
SAVE_S, RESTART_S = 10, 300  # assumed: a background save stops training 10 s; a restart takes five minutes


@dataclass(frozen=True)
class Point:
    world: int
    plan: Plan | None  # None: cannot run
    why: str = ""


def point(model: str, layout: str, world: int, weak: bool) -> Point:
    parallel = LAYOUTS[layout]
    if parallel.strategy == "hsdp":
        if world % COPY_RANKS:
            return Point(world, None, f"{COPY_RANKS} does not divide it")
        parallel = replace(parallel, replicas=world // COPY_RANKS)
    train = TrainConfig(tokens_per_step=WEAK_SEQUENCES * 4096 * world if weak else STRONG_TOKENS,
                        micro_batch=WEAK_SEQUENCES * parallel.tensor,
                        precision="bf16", activation_checkpointing="full" if model == "70B" else "none")
    try:
        plan = make_plan(replace(Config(), model=MODELS[model], train=train, parallel=parallel), world,
                         find_device(DEVICE))
    except UserError:
        return Point(world, None, "fewer sequences than ranks")
    return Point(world, plan) if plan.memory.fits else Point(world, None, f"needs {plan.memory.total / 1e9:.0f} GB")


def lost_to_failures(world: int) -> float:
    """Share of the time that checkpoints, repeated work and restarts take."""
    between = DEVICE_HOURS_BETWEEN_FAILURES / world * 3600
    return min(1.0, math.sqrt(2 * SAVE_S / between) + RESTART_S / between)


def curves(model: str, weak: bool) -> dict[str, list[Point]]:
    return {layout: [point(model, layout, world, weak) for world in WORLDS] for layout in LAYOUTS}


def cell(point: Point) -> str:
    if point.plan is None:
        return point.why
    return f"{point.plan.mfu:.0%}, {point.plan.time.exposed / point.plan.time.total:.0%} exposed"


def table(found: dict[str, list[Point]]) -> list[str]:
    lines = ["| GPUs | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    return lines + [f"| {world:,} | " + " | ".join(cell(points[i]) for points in found.values()) + " |"
                    for i, world in enumerate(WORLDS)]


def plot(found: dict[tuple[str, bool], dict[str, list[Point]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(10, 7), sharex=True, sharey=True)
    for axes, ((model, weak), layouts) in zip(grid.flat, found.items(), strict=True):
        for layout, points in layouts.items():
            there = [p for p in points if p.plan is not None]
            axes.plot([p.world for p in there], [100 * p.plan.mfu for p in there], marker="o", markersize=3,
                      label=layout)
        axes.set(xscale="log", title=f"{model}, {'weak' if weak else 'strong'} scaling", ylim=(0, 60))
        axes.grid(alpha=0.3)
    for axes in grid[1]:
        axes.set_xlabel("GPUs (H100)")
    for axes in grid[:, 0]:
        axes.set_ylabel("model FLOPs utilisation, %")
    grid[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    output = parser.parse_args().output
    found = {(model, weak): curves(model, weak) for model in MODELS for weak in (True, False)}
    plot(found, output / "scaling.png")
    names = {True: "weak: 8,192 tokens of every GPU and step", False: "strong: 16.8 million tokens a step"}
    sections = [f"## {model}, {names[weak]}\n\n" + "\n".join(table(layouts))
                for (model, weak), layouts in found.items()]
    losses = "\n".join(f"| {world:,} | {DEVICE_HOURS_BETWEEN_FAILURES / world:,.1f} h | {lost_to_failures(world):.1%} |"
                       for world in WORLDS[3:])
    path = output / "scaling.md"
    kept = path.read_text().partition("<!-- tables -->")[0] if path.exists() else "# Scaling, on paper\n\n"
    how = f"by the formulas alone; {time.strftime('%Y-%m-%d')}; python -m benchmarks.plan_scaling"
    path.write_text(f"{kept}<!-- tables -->\n\n{how}\n\n" + "\n\n".join(sections)
                    + "\n\n## Failures\n\n| GPUs | a failure every | time lost |\n|---|---|---|\n" + losses + "\n")


if __name__ == "__main__":
    main()
