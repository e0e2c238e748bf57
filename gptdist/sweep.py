"""`gptdist sweep`: small models on a token budget, a loss-compute curve through them, and its word on the next size.

Every size is a run of `gptdist train` in OUTPUT/SIZE, which goes on where it was stopped; a stop signal reaches it, and
so does the end of this process. The curve is

    L(C) = a + b (C / C0)^-alpha,    a, b >= 0

with L the final validation loss, C the training FLOPs (metrics.flops_per_token times tokens) and C0 the first size's.
For each alpha on a grid a and b are a linear least-squares fit; the best alpha is refined. The prediction for the next
size is written down before that size is run.
Sources: Kaplan et al., "Scaling laws for neural language models" (2020); Hoffmann et al., "Training compute-optimal
large language models" (2022).
"""

import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from gptdist import config as config_module
from gptdist.config import Config, to_dict
from gptdist.data.prepare import prepare_input
from gptdist.data.tokenizer import Tokenizer
from gptdist.errors import EXIT_REQUEUE, UserError
from gptdist.faults.child import Child
from gptdist.files import replace_text
from gptdist.metrics import flops_per_token, read_rows
from gptdist.model import parameter_count
from gptdist.parallel.host import has_bf16

ALPHAS = np.geomspace(0.01, 3.0, 400)
FEWEST = 3  # sizes: the curve has three parameters


@dataclass(frozen=True)
class Size:
    """One model of a sweep and its budget."""

    name: str  # WIDTHxLAYERS
    width: int
    n_layers: int
    n_heads: int
    parameters: int
    tokens: int  # a multiple of tokens_per_step
    steps: int
    flops: float


@dataclass(frozen=True)
class Curve:
    """loss(C) = a + b (C / c0)^-alpha."""

    a: float
    b: float
    alpha: float
    c0: float
    rms: float  # of the residuals, nats

    def loss(self, flops: float | np.ndarray) -> Any:
        return self.a + self.b * (flops / self.c0) ** -self.alpha

    @property
    def at_border(self) -> bool:
        """Whether the points are no such curve: they do not fall, or alpha is at an end of its grid."""
        return self.b == 0 or not ALPHAS[0] < self.alpha < ALPHAS[-1]


FAST = 0.01  # residuals of a curve with a = 0, as a share of its first loss, from which it is too slow for its points


def falls_faster(curve: Curve) -> bool:
    """Whether the points fall faster than a power of the compute, as at the beginning of training."""
    return curve.a == 0 and curve.rms > FAST * curve.loss(curve.c0)


def fit_curve(flops: Sequence[float], losses: Sequence[float]) -> Curve:
    """The curve of least squared residuals. Raises UserError for fewer than three different computes."""
    x, y = np.asarray(flops, float), np.asarray(losses, float)
    if len(set(flops)) < FEWEST:
        raise UserError(f"a loss-compute curve needs {FEWEST} sizes or more, got {len(set(flops))}")
    c0 = float(x.min())
    alphas = ALPHAS
    for _ in range(4):  # each grid is between the neighbours of the best one of the last
        fits = [_fit_line((x / c0) ** -alpha, y) for alpha in alphas]
        best = min(range(len(alphas)), key=lambda i: fits[i][2])
        alpha, (a, b, error) = float(alphas[best]), fits[best]
        if alpha in (ALPHAS[0], ALPHAS[-1]):
            break
        alphas = np.linspace(alphas[max(best - 1, 0)], alphas[min(best + 1, len(alphas) - 1)], 41)
    return Curve(a, b, alpha, c0, math.sqrt(error / len(x)))


def prediction_range(flops: Sequence[float], losses: Sequence[float], at: float) -> list[float] | None:
    """[least, most] of what the curves through all points but one say of a compute: how much hangs on a single one.

    None for as few points as a curve needs.
    """
    if len(set(flops)) <= FEWEST:
        return None
    rest = [[i for i in range(len(flops)) if i != left_out] for left_out in range(len(flops))]
    predicted = [fit_curve([flops[i] for i in kept], [losses[i] for i in kept]).loss(at) for kept in rest]
    return [min(predicted), max(predicted)]


def _fit_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """(a, b, sum of squared residuals) of y = a + b x with a, b >= 0."""
    b = float(((x - x.mean()) * (y - y.mean())).sum() / max(((x - x.mean()) ** 2).sum(), 1e-30))
    a = float(y.mean() - b * x.mean())
    if a < 0:
        a, b = 0.0, float((x * y).sum() / (x * x).sum())
    if b < 0:
        a, b = float(y.mean()), 0.0
    return a, b, float(((y - a - b * x) ** 2).sum())


def plan_size(config: Config, name: str, *, tokens: int = 0, tokens_per_parameter: float = 0.0) -> Size:
    """The model WIDTHxLAYERS with heads as wide as the configuration's. Raises UserError for an impossible one."""
    match = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,3})", name)
    if match is None:
        raise UserError(f"size {name!r} is not understood, expected WIDTHxLAYERS such as 128x4")
    width, n_layers = map(int, match.groups())
    head = config.model.head_dim
    if width % head:
        raise UserError(f"size {name}: the width is no multiple of {head}, the configuration's width of a head")
    model = dataclasses.replace(config.model, width=width, n_layers=n_layers, n_heads=width // head, n_kv_heads=None)
    parameters = parameter_count(model)
    wanted = tokens or tokens_per_parameter * parameters
    steps = math.ceil(wanted / config.train.tokens_per_step)
    tokens = steps * config.train.tokens_per_step
    return Size(name, width, n_layers, width // head, parameters, tokens, steps,
                flops_per_token(model, parameters) * tokens)


def run_sweep(path: str, overrides: list[str], *, output: Path, sizes: Sequence[str], next_size: str | None = None,
              tokens: int = 0, tokens_per_parameter: float = 20.0, processes: int = 1,
              console: Console | None = None) -> tuple[int, dict[str, Any]]:
    """(exit code, record) of a whole sweep; the record is also OUTPUT/sweep.json, and its plot OUTPUT/sweep.png.

    The exit code is that of a run that asks to be started again (75), else 0. Raises UserError where a run fails.
    """
    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    config = _resolved(path, overrides)
    budget = {"tokens": tokens} if tokens else {"tokens_per_parameter": tokens_per_parameter}
    if min(budget.values()) <= 0 or processes < 1:
        raise UserError(f"the token budget is {min(budget.values())} and there are {processes} processes, expected "
                        f"more than 0 of both")
    names = list(dict.fromkeys(sizes))
    if len(names) < FEWEST:
        raise UserError(f"a loss-compute curve needs {FEWEST} sizes or more, got {' '.join(names) or 'none'}")
    planned = sorted((plan_size(config, name, **budget) for name in names), key=lambda size: size.flops)
    record = _open_record(output, {"config": _relevant(config), "budget": budget})
    for size in planned:
        code = _train(path, overrides, config, size, output, processes, record, console)
        if code:
            return code, record
    runs = record["runs"]
    points = [runs[size.name]["flops"] for size in planned], [runs[size.name]["loss"] for size in planned]
    curve = fit_curve(*points)
    record["curve"] = dataclasses.asdict(curve) | {"sizes": [size.name for size in planned],
                                                   "is_power_law": not curve.at_border}
    if next_size is not None:
        size = plan_size(config, next_size, **budget)
        record["next"] = {"size": size.name, "flops": size.flops, "predicted": curve.loss(size.flops),
                          "range": prediction_range(*points, size.flops)}
        _write(output, record)
        code = _train(path, overrides, config, size, output, processes, record, console)
        if code:
            return code, record
        measured = runs[size.name]["loss"]
        record["next"] |= {"loss": measured, "error": record["next"]["predicted"] - measured}
    _write(output, record)
    plot(record, curve, output / "sweep.png")
    return 0, record


def _resolved(path: str, overrides: list[str]) -> Config:
    """The configuration that all sizes share, its data prepared, vocabulary and precision known."""
    config = config_module.load(path, overrides)
    if config.is_finetuning:
        raise UserError(f"{path} has task.name={config.task.name}: a sweep pretrains")
    data = config.data
    if kind := next((kind for kind in ("epochs", "from_step") for entry in data.mixture if kind in entry), None):
        raise UserError(f"data.mixture has {kind}, but a sweep gives every size its own tokens: use weights alone")
    if data.input:
        prepare_input(data)
    path = Path(data.mixture[0]["path"] if data.mixture else data.path)
    vocab = config.model.vocab_size or Tokenizer.load(path / "tokenizer").vocab_size
    on_gpu = config.parallel.device != "cpu" and torch.cuda.is_available()
    train = config.train.resolved(has_bf16(torch.device("cuda" if on_gpu else "cpu")))
    return dataclasses.replace(config, train=train, model=dataclasses.replace(config.model, vocab_size=vocab))


def _relevant(config: Config) -> dict[str, Any]:
    """What the losses depend on."""
    values = to_dict(config)
    return {name: values[name] for name in ("model", "data", "train", "optim", "schedule")} | {
        "seed": config.run.seed}


def _open_record(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of a sweep that goes on, or a new one."""
    settings = json.loads(json.dumps(settings))
    path = output / "sweep.json"
    try:
        output.mkdir(parents=True, exist_ok=True)
        record = json.loads(path.read_text()) if path.exists() else {"settings": settings, "runs": {}}
    except OSError as error:
        raise UserError(f"cannot write to --output {output}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): move it away, the runs beside it will be taken up") from error
    if record.get("settings") != settings:
        raise UserError(f"{path} is of a sweep with another configuration or budget: choose another --output")
    return {"settings": settings, "runs": record["runs"]}


def _write(output: Path, record: dict[str, Any]) -> None:
    replace_text(output / "sweep.json", json.dumps(record, indent=1) + "\n")


def _train(path: str, overrides: list[str], config: Config, size: Size, output: Path, processes: int,
           record: dict[str, Any], console: Console) -> int:
    """Train one size, if that is not done, and note its loss. 0, or 75 if it was stopped."""
    if size.name in record["runs"]:
        console.print(f"{size.name}: done before, loss {record['runs'][size.name]['loss']:.4f}")
        return 0
    run, log = output / size.name, output / f"{size.name}.log"
    warmup = round(size.steps * config.schedule.warmup_steps / config.train.steps)
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [*launcher, "gptdist", "train", path, *overrides, f"--model.width={size.width}",
               f"--model.n_layers={size.n_layers}", f"--model.n_heads={size.n_heads}", "--model.n_kv_heads=null",
               f"--train.steps={size.steps}", "--train.epochs=0", "--train.stop_at=0",
               f"--schedule.warmup_steps={warmup}", "--eval.tokens=0",
               f"--run.dir={run}"]
    console.print(f"{size.name}: {size.parameters:,} parameters, {size.tokens:,} tokens in {size.steps} steps; "
                  f"log: {log}")
    child = Child(command, log)
    code = child.run()
    exit_json = run / "exit.json"
    if code and exit_json.exists():  # torchrun flattens its workers' codes
        code = json.loads(exit_json.read_text())["code"]
    if code == EXIT_REQUEUE or (code and child.stopped):
        console.print(f"{size.name}: stopped; the same command goes on with it")
        return EXIT_REQUEUE
    if code:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise UserError(f"size {size.name} ended with exit code {code}: {lines[-1][:300]} (see {log})")
    losses = [row["val_loss"] for row in read_rows(run / "metrics.jsonl")
              if row["kind"] == "eval" and row["step"] == size.steps]
    if not losses:
        raise UserError(f"{run} has no validation loss of step {size.steps}: does the data have a val/?")
    if losses[-1] is None:
        raise UserError(f"{run} ends with a validation loss that is not finite: lower optim.lr")
    record["runs"][size.name] = dataclasses.asdict(size) | {"loss": losses[-1]}
    _write(output, record)
    console.print(f"{size.name}: loss {losses[-1]:.4f}")
    return EXIT_REQUEUE if child.stopped else 0


def print_sweep(console: Console, record: dict[str, Any]) -> None:
    curve = record["curve"]
    fitted = Curve(*(curve[name] for name in ("a", "b", "alpha", "c0", "rms")))
    table = Table(title=f"L = {fitted.a:.4f} + {fitted.b:.4f} (C / {fitted.c0:.3g})^-{fitted.alpha:.4f}; residuals "
                        f"{fitted.rms:.4f} nats")
    for column in ("size", "parameters", "tokens", "FLOPs", "loss", "curve", "curve - loss"):
        table.add_column(column, justify="left" if column == "size" else "right")
    following = record.get("next", {}).get("size")
    names = [*curve["sizes"], *([following] if following and following not in curve["sizes"] else [])]
    for name in names:
        run = record["runs"][name]
        value = fitted.loss(run["flops"])
        table.add_row(f"{name} (next)" if name == following else name, f"{run['parameters']:,}", f"{run['tokens']:,}",
                      f"{run['flops']:.3g}", f"{run['loss']:.4f}", f"{value:.4f}", f"{value - run['loss']:+.4f}")
    console.print(table)
    if not curve["is_power_law"]:
        console.print("the losses do not fall as a power of the compute: take more sizes, or a larger budget")
    if falls_faster(fitted):
        console.print("the losses fall faster than a power of the compute, and a prediction is too high: these "
                      "budgets end in the first phase of training; give more tokens")
    for less, more in itertools.pairwise(curve["sizes"]):
        if record["runs"][more]["loss"] >= record["runs"][less]["loss"]:
            console.print(f"{more} has no lower loss than {less}, which took less compute: a curve through both "
                          f"predicts little. Give more tokens, try another optim.lr, or take sizes of one shape")
    if following:
        ahead = record["next"]
        if ahead["range"]:
            console.print("without one of the sizes the curve says {:.4f} to {:.4f} of {}".format(*ahead["range"],
                                                                                                  following))
        console.print(f"{following}: predicted {ahead['predicted']:.4f}, measured {ahead['loss']:.4f}, error "
                      f"{ahead['error']:+.4f} nats ({abs(ahead['error']) / ahead['loss']:.2%})")


def plot(record: dict[str, Any], curve: Curve, path: Path) -> None:
    """Losses over compute, the curve, and the next size as predicted and as measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [record["runs"][name] for name in record["curve"]["sizes"]]
    ahead = record.get("next")
    figure, axes = pyplot.subplots(figsize=(7, 4))
    ends = [run["flops"] for run in runs] + ([ahead["flops"]] if ahead else [])
    x = np.geomspace(min(ends) / 1.5, max(ends) * 2, 200)
    axes.plot(x, curve.loss(x), linewidth=1, color="gray",
              label=f"{curve.a:.3f} + {curve.b:.3f} (C / {curve.c0:.2g})^-{curve.alpha:.3f}")
    axes.plot([run["flops"] for run in runs], [run["loss"] for run in runs], "o", label="measured")
    for run in runs:
        axes.annotate(run["name"], (run["flops"], run["loss"]), textcoords="offset points", xytext=(5, 5), fontsize=8)
    if ahead:
        axes.plot([ahead["flops"]], [ahead["predicted"]], "x", label=f"{ahead['size']} predicted")
        axes.plot([ahead["flops"]], [ahead["loss"]], "s", label=f"{ahead['size']} measured")
    axes.set(xscale="log", xlabel="training compute (FLOPs)", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
