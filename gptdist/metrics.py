"""What a run reports: metrics.jsonl, TensorBoard, Weights & Biases, model FLOPs utilisation, the loss curve."""

import contextlib
import json
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptdist.config import ModelConfig, RunConfig
from gptdist.errors import MissingError, UserError
from gptdist.files import replace_text

# Peak dense bf16 FLOP/s by device name, from the vendors' data sheets. An unknown device has no MFU rather than a
# wrong one.
PEAK_BF16_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12,
}


def peak_flops(device_name: str) -> float | None:
    words = f" {device_name.replace('-', ' ')} "  # "L4" is not "L40"
    return next((peak for name, peak in PEAK_BF16_FLOPS.items() if f" {name} " in words), None)


def flops_per_token(config: ModelConfig, n_parameters: int) -> float:
    """Training FLOPs per token, forward and backward: 6 N + 12 L C T (Chowdhery et al. 2022, appendix B).

    N leaves out the position table, which is looked up and never multiplied.
    """
    position_table = config.context * config.width if config.positions == "learned" else 0
    return 6 * (n_parameters - position_table) + 12 * config.n_layers * config.width * config.context


class Metrics:
    """Writes one run's rows, on the main rank only. Rows past `start_step` from a run that died are dropped first."""

    def __init__(self, run_dir: Path, config: RunConfig, *, start_step: int, resolved: dict[str, Any]):
        self.path = run_dir / "metrics.jsonl"
        with _writing(run_dir):
            _truncate(self.path, start_step)
            self._file = self.path.open("a", encoding="utf-8")
            self._board = _tensorboard(run_dir, start_step) if config.tensorboard else None
        self._wandb = _wandb(config.wandb, run_dir, resolved) if config.wandb else None

    def write(self, kind: str, step: int, **values: Any) -> None:
        """A row; in the file a number that is not finite, which JSON does not have, is null."""
        scalars = {name: v for name, v in values.items() if isinstance(v, float)}
        texts = {name: v for name, v in values.items() if isinstance(v, str)}
        finite = values | {name: None for name, v in scalars.items() if not math.isfinite(v)}
        with _writing(self.path):
            self._file.write(json.dumps({"kind": kind, "step": step} | finite) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in scalars.items():
                    self._board.add_scalar(f"{kind}/{name}", value, step)
                for name, text in texts.items():
                    self._board.add_text(f"{kind}/{name}", textwrap.indent(text, "    "), step)  # Markdown for code
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": v for name, v in scalars.items()}, step=step)

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`, from which the run goes on again."""
        with _writing(self.path):
            self._file.close()
            _truncate(self.path, step)
            self._file = self.path.open("a", encoding="utf-8")
            if self._board is not None:
                self._board.close()
                self._board = _tensorboard(self.path.parent, step)

    def close(self) -> None:
        with _writing(self.path):
            self._file.close()
            if self._board is not None:
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}: make room or choose another "
                        "run.dir") from error


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows, each with kind and step, to a JSONL file beside metrics.jsonl."""
    with _writing(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def drop_rows_after(path: Path, step: int) -> None:
    """Drop the rows that a run which died wrote after the step from which it goes on."""
    with _writing(path):
        _truncate(path, step)


def _truncate(path: Path, start_step: int) -> None:
    if not path.exists():
        return
    rows = [row for row in read_rows(path) if row["step"] <= start_step]
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or "kind" not in row:
            raise UserError(f"{path} line {number} is not a row of metrics, expected a JSON object with kind and step: "
                            f"{line[:60]!r}")
        rows.append(row)
    return rows


def _tensorboard(run_dir: Path, start_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)


def _wandb(project: str, run_dir: Path, resolved: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingError("run.wandb is set, but the wandb package is not installed: pip install 'gptdist[wandb]', or "
                           "unset run.wandb") from error
    try:
        return wandb.init(project=project, dir=str(run_dir), config=resolved, resume="allow")
    except wandb.errors.Error as error:
        raise UserError(f"run.wandb={project}: Weights & Biases does not start ({' '.join(str(error).split())[:200]}): "
                        f"set WANDB_API_KEY, or `wandb login`, or WANDB_MODE=offline") from error


def plot_losses(run_dir: Path, output: Path, baseline: float | None = None) -> None:
    """Write the loss curve of a run as a PNG; `baseline`: a horizontal line, in nats per token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = run_dir / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{run_dir} has no metrics.jsonl: expected the directory of a training run (run.dir)")
    rows = read_rows(path)
    train, evals = _points(path, rows, "train", "loss"), _points(path, rows, "eval", "val_loss")
    if not train:
        raise UserError(f"{path} has no training rows with a finite loss yet")
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(*zip(*train, strict=True), linewidth=0.8, alpha=0.7, label="training")
    if evals:
        axes.plot(*zip(*evals, strict=True), marker="o", markersize=3, label="validation")
    if baseline is not None:
        axes.axhline(baseline, linestyle="--", color="gray", label=f"bigram model ({baseline:.2f})")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    try:
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the plot {output}: {error}") from error
    finally:
        pyplot.close(figure)


def _points(path: Path, rows: list[dict[str, Any]], kind: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of the rows of one kind where it is finite, that is not null. Raises UserError naming the line
    without a number."""
    points = []
    for number, row in enumerate(rows, 1):
        if row["kind"] == kind and row.get(name, "nothing") is not None:
            if not isinstance(row.get(name), int | float):
                raise UserError(f"{path} line {number} has no number as {name}, got {row.get(name)!r:.60}: remove that "
                                "line, or move the file away")
            points.append((row["step"], row[name]))
    return points
