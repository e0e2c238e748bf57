"""Which steps are not to be taken: those whose loss or gradient is not finite, or far above what it was.

A function of the losses and gradient norms before, which a checkpoint keeps: a resumed run judges as if it had not
stopped.
"""

import math
import statistics
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gptdist.config import TrainConfig

NOT_FINITE, SPIKE = "not finite", "spike"


def is_finite(values: Tensor) -> bool:
    """Without a mask as large as the values: a sum over finite fp32 values in fp64 is finite."""
    return not values.is_floating_point() or math.isfinite(values.sum(dtype=torch.float64).item())


def fault_of(loss: float, norm: float, recent: Sequence[Sequence[float]], config: TrainConfig) -> str | None:
    """NOT_FINITE, SPIKE, or None for a step to take. recent: (loss, norm) of the steps taken, the last ones.

    A spike is judged once train.spike_window steps have been taken.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return NOT_FINITE
    if len(recent) < config.spike_window:
        return None
    losses, norms = zip(*recent, strict=True)
    too_lossy = config.spike_loss > 0 and loss > statistics.median(losses) + config.spike_loss
    too_steep = config.spike_norm > 0 and norm > statistics.median(norms) * config.spike_norm
    return SPIKE if too_lossy or too_steep else None


def remember(recent: Sequence[Sequence[float]], loss: float, norm: float, config: TrainConfig) -> list[list[float]]:
    """`recent` after a step that was taken; empty where no spike is looked for."""
    if not config.looks_for_spikes:
        return []
    return [*recent, [loss, norm]][-config.spike_window:]


def describe_spike(loss: float, norm: float, recent: Sequence[Sequence[float]]) -> str:
    losses, norms = zip(*recent, strict=True)
    return (f"a spike: loss {loss:.4f}, median of {len(recent)} steps {statistics.median(losses):.4f}; gradient norm "
            f"{norm:.3g}, median {statistics.median(norms):.3g}")


def describe_nonfinite(loss: float, norm: float, everyone: Sequence[tuple[str, bool, list[str], list[str]]],
                       names: Sequence[str]) -> str:
    """What went bad where. everyone: of each rank its host, if its own loss is finite, and the names of parameters of
    which it holds gradients, and weights, that are not. names: all parameters in the order of the forward pass."""
    ranks = [f"rank {rank} (host {host})" for rank, (host, finite, _, _) in enumerate(everyone) if not finite]
    gradients = _in_order(names, (bad for _, _, bad, _ in everyone))
    weights = _in_order(names, (bad for _, _, _, bad in everyone))
    told = [f"the loss of {', '.join(ranks[:8])} is not" if ranks else "every rank's own loss is finite"]
    if weights:
        told.append(f"{len(weights)} weights are not, the first is {weights[0]}")
    if gradients:
        told.append(f"of {len(names)} parameters {len(gradients)} have such gradients, the nearest to the loss is "
                    f"{gradients[-1]}")
    return f"the gradient is not finite (norm {norm:.3g}, loss {loss:.4g}): {'; '.join(told)}"


def _in_order(names: Sequence[str], found: Iterable[Sequence[str]]) -> list[str]:
    bad = {name for group in found for name in group}
    return [name for name in names if name in bad]
