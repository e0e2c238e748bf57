"""What gpu_check.py runs, section by section: each is a generator of results, every one written as soon as it is there.

`tiny` shrinks everything to what a CPU does in seconds, to see that all of it runs.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import attention_checks, checks, ops_timed, training_speed
from benchmarks.kernels import Limits, measured_limits, rows
from gptdist.ops import backends

Result = tuple[str, dict[str, Any]]  # its kind ("check", "time", "limits", "training", "smoke"), its fields
TINY_SHAPES = checks.Shapes(rows=(1, 9), widths=(64, 72), vocabularies=(1, 17), blocks=((1, 1, 1), (2, 5, 63)),
                            decode=((2, 1, 2, 1, 64, 70), (1, 20, 1, 2, 128, 0)), optimized=(1, 70, 8200))
TINY_LENGTHS, TINY_LONG = (1, 131), 200
SMOKE_SHAPES = checks.Shapes(rows=(5,), widths=(64, 8200), vocabularies=(1000,), blocks=((2, 5, 63),))


def check_ops(device: torch.device, tiny: bool) -> Iterator[Result]:
    for check in checks.correctness(device, TINY_SHAPES if tiny else checks.Shapes()):
        yield "check", as_fields(check)


def check_attention(device: torch.device, tiny: bool) -> Iterator[Result]:
    sizes = (TINY_LENGTHS, TINY_LONG) if tiny else (attention_checks.LENGTHS, attention_checks.LONG)
    for check in attention_checks.correctness(device, *sizes):
        yield "check", as_fields(check)


def as_fields(check: checks.Check) -> dict[str, Any]:
    return asdict(check) | {"ok": check.ok}


def time_ops(device: torch.device, tiny: bool) -> Iterator[Result]:
    yield from times([name for name in ops_timed.FAMILIES if name != "attention"], {"PyTorch"}, device, tiny)


def time_attention(device: torch.device, tiny: bool) -> Iterator[Result]:
    yield from times(["attention"], {"flash", "cuDNN", "SDPA"}, device, tiny)


def times(names: list[str], peers: set[str], device: torch.device, tiny: bool) -> Iterator[Result]:
    """kernels.py has further peers, those that compile among them."""
    families = {name: ops_timed.tiny(ops_timed.FAMILIES[name]) if tiny else ops_timed.FAMILIES[name] for name in names}
    dtypes = dict.fromkeys(dtype for family in families.values() for dtype in family.dtypes(device))
    limits = limits_of(device, dtypes, tiny)
    yield "limits", asdict(limits)
    options = dict(repeats=2 if tiny else 31, limit_s=0.1 if tiny else 1.0, peers=peers, with_errors=False)
    for row in rows(device, limits, families=families, **options):
        yield "time", asdict(row)


def limits_of(device: torch.device, dtypes, tiny: bool) -> Limits:
    return measured_limits(device, dtypes, 11, *((1 << 16, 64) if tiny else (1 << 29, 8192)))


def train(device: torch.device, tiny: bool) -> Iterator[Result]:
    for speed in training_speed.speeds(device, tiny):
        yield "training", asdict(speed)


def smoke(device: torch.device, tiny: bool) -> Iterator[Result]:
    """Every kernel's ops once on small shapes, for the sanitizer to watch; no numbers are compared."""
    dtype = torch.bfloat16
    for case in checks.cases(device, dtype, TINY_SHAPES if tiny else SMOKE_SHAPES):
        checks.with_gradients(case.function, case.tensors)
    for options in attention_checks.OPTIONS:
        for D in (64, 128):
            case = attention_checks.AttentionCase(1, 131, 1, 2, D, **options)
            tensors = tuple(torch.randn(1, 131, 1, n, D, device=device).to(dtype) for n in (2, 1, 1))
            checks.with_gradients(attention_checks.packed(case, device), tensors)
    yield "smoke", {"device": str(device)}


@dataclass(frozen=True)
class Section:
    """run(device, tiny) gives the results; limit_s is the most time it gets; tool: of compute-sanitizer, around it."""

    title: str
    run: Callable[[torch.device, bool], Iterator[Result]]
    limit_s: float
    tool: str = ""


# In the order of their worth: what is last is cut first where the budget ends.
SECTIONS = {
    "ops": Section("Correctness of all ops but attention", check_ops, 90),
    "attention": Section("Correctness of attention", check_attention, 100),
    "attention-times": Section("Times of attention", time_attention, 70),
    "training": Section("Training", train, 150),
    "times": Section("Times of the other ops", time_ops, 60),
    "memcheck": Section("compute-sanitizer memcheck", smoke, 60, tool="memcheck"),
    "racecheck": Section("compute-sanitizer racecheck", smoke, 60, tool="racecheck"),
}
HIDDEN = {"smoke": Section("Small shapes", smoke, 60)}  # what the sanitizer's tools run


def setup(device: torch.device) -> None:
    """Load the kernels, so that a problem is known before anything is measured."""
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        problem = backends.cuda_problem(device.index)
        if problem:
            print(f"gpu_check: the kernels do not run: {problem}", file=sys.stderr)
