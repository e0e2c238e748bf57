"""Times of functions on a device: several in alternation, so that all meet the same disturbances; medians."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UPS = 3
FEWEST_ROUNDS = 3
# The GPU waits this long before each measured call, in its clock's cycles: about 0.4 ms, in which the host has issued
# all of the call. Without it the host's time is measured wherever it is longer than the kernels'.
HEAD_START_CYCLES = 700_000


@dataclass(frozen=True)
class Time:
    """Median milliseconds; or why there is none, in `refusal`."""

    ms: float | None
    refusal: str = ""


def alternating(
    functions: dict[str, Callable], device: torch.device, *, repeats: int, limit_s: float
) -> dict[str, Time]:
    """The time of each function. One that raises has its error's first line instead, and the others go on.

    Rounds end after `repeats`, or after `limit_s` seconds if there have been FEWEST_ROUNDS.
    """
    refusals = {name: refusal(function) for name, function in functions.items()}
    running = {name: function for name, function in functions.items() if not refusals[name]}
    rounds, end = [], time.monotonic() + limit_s
    while running and len(rounds) < repeats and (len(rounds) < FEWEST_ROUNDS or time.monotonic() < end):
        rounds.append({name: sample(function, device) for name, function in running.items()})
        synchronize(device)
    times = {name: Time(statistics.median(elapsed_ms(*marks[name]) for marks in rounds)) for name in running}
    return {name: times.get(name) or Time(None, refusals[name]) for name in functions}


def refusal(function: Callable) -> str:
    """Warm a function up: why it does not run, or the empty string."""
    try:
        for _ in range(WARM_UPS):
            function()
    except Exception as error:  # whatever a backend or a compiler raises
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # of what it had when it ran out of memory
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ""


def sample(function: Callable, device: torch.device) -> tuple:
    """Marks before and after one call."""
    if device.type == "cuda":
        torch.cuda._sleep(HEAD_START_CYCLES)
    start = mark(device)
    function()
    return start, mark(device)


def mark(device: torch.device):
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(start, end) -> float:
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_ms(function: Callable, device: torch.device, repeats: int) -> float:
    (time_,) = alternating({"it": function}, device, repeats=repeats, limit_s=5.0).values()
    if time_.ms is None:
        raise RuntimeError(time_.refusal)
    return time_.ms


def copy_bandwidth(device: torch.device, count: int, repeats: int) -> float:
    """Bytes per second, read and written, of a copy of `count` bytes."""
    source = torch.ones(max(1, count // 4), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (one_ms(lambda: target.copy_(source), device, repeats) / 1e3)


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    """FLOP/s of a product of two matrices of size x size: what stands for the peak in `dtype`."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / (one_ms(lambda: a @ b, device, repeats) / 1e3)
