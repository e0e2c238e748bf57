"""Learning rate schedules: pure functions of the step."""

import math

from gptdist.config import ScheduleConfig


def lr_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """Learning rate of `step` (0-based) over the peak, for a run of `steps`.

    Linear warmup reaches 1 at step warmup_steps - 1. Cosine (Loshchilov & Hutter 2017), linear, and
    warmup-stable-decay (Hu et al. 2024) then end at min_ratio on the last step.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    last = steps - 1
    if config.name == "constant":
        return 1.0
    start = config.warmup_steps
    if config.name == "wsd":
        start = max(start, steps - max(1, round(config.decay_fraction * steps)))
    progress = min(1.0, max(0.0, (step - start) / max(1, last - start)))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.name == "cosine" else 1 - progress
    return config.min_ratio + (1 - config.min_ratio) * shape
