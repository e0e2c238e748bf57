"""Training on a CPU: this project's step beside its peers, in tokens per second, memory and share of the limit.

    python -m benchmarks.train_cpu [--shapes 4x64 4x256 1x1024] [--only NAME ...] [--rounds N] [--steps N]
                                   [--output FILE.md]

A GPT-2 of 124M (other sizes: --layers, --width, --heads, --vocab) trains on random tokens; a step is forward, backward,
clipping and AdamW. Each contender runs in a process of its own, so that its allocator and its peak memory are its own;
contenders alternate, `--rounds` times; medians over all timed steps.

    gptdist                       the trainer's step: strategy single, as `gptdist train` runs it
    reference, reference compiled the same with GPTDIST_OPS=reference, eager and with torch.compile of each block
    hf, hf compiled               Hugging Face's GPT2LMHeadModel (SDPA attention), AdamW as torch makes it
    hf tuned                      fused AdamW, and tcmalloc where installed (else glibc told to keep what is freed): the
                                  strongest of PyTorch's own

each in bf16 (autocast in Hugging Face's) and in fp32; where the processor does not multiply bf16, in fp32 alone unless
--only asks for more.

The limit: the step's own matrix products alone, in the contender's dtype, with as many threads, in the same rounds; to
them attention's operations are added at the same rate. Needs the package transformers (the test extra) for the peers.
"""

import argparse
import ctypes.util
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.tokenize import describe
from benchmarks.training_speed import CLIP, LEARNING_RATE
from benchmarks.training_speed import step as training_step
from gptdist.config import Config, ModelConfig, ParallelConfig, TrainConfig
from gptdist.parallel.host import has_bf16, keep_freed_memory, physical_cores, set_up_process

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 50257
BATCHES = 8  # different ones, in turn
TCMALLOC = ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")


@dataclass(frozen=True)
class Shape:
    """Sequences and tokens of each, in one step."""

    batch: int
    context: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        batch, _, context = text.partition("x")
        if not (batch.isdecimal() and context.isdecimal() and int(batch) and int(context)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a shape: write BATCHxCONTEXT, as 4x256")
        return cls(int(batch), int(context))

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}"

    @property
    def tokens(self) -> int:
        return self.batch * self.context


@dataclass(frozen=True)
class Size:
    """A GPT-2."""

    layers: int
    width: int
    heads: int
    vocab: int

    def matrices(self) -> list[tuple[int, int, int]]:
        """(inputs, outputs, how often) of every matrix product of the forward pass."""
        C, L = self.width, self.layers
        return [(C, 3 * C, L), (C, C, L), (C, 4 * C, L), (4 * C, C, L), (C, self.vocab, 1)]

    def attention_flops(self, shape: Shape) -> float:
        """Forward and backward (2 and 5 products), the causal half."""
        return 7 * 2 * self.layers * self.width * shape.tokens * shape.context / 2

    def matrix_flops(self, shape: Shape) -> float:
        return 6 * shape.tokens * sum(inputs * outputs * times for inputs, outputs, times in self.matrices())


# A contender gives the function of one step: (tokens, targets), both (B, T) int64 -> mean loss.
Step = Callable[[Tensor, Tensor], float]


def gptdist_step(size: Size, shape: Shape, *, precision: str, compiled: bool = False) -> Step:
    from gptdist.model import build
    from gptdist.optim.adamw import build_adamw
    from gptdist.parallel.strategies import make_strategy
    from gptdist.parallel.world import init_world

    model = ModelConfig(context=shape.context, width=size.width, n_layers=size.layers, n_heads=size.heads,
                        vocab_size=size.vocab)
    config = Config(model=model, train=TrainConfig(precision=precision, compile=compiled),
                    parallel=ParallelConfig(strategy="single", device="cpu"))
    world = init_world(config.parallel)
    set_up_process(world.device)
    strategy = make_strategy(world, config)
    strategy.prepare(build(config), lambda parameters: build_adamw(parameters, config.optim))

    return lambda tokens, targets: training_step(strategy, tokens, targets).item()


def hf_step(size: Size, shape: Shape, *, bf16: bool, compiled: bool = False, tuned: bool = False) -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    if tuned and not TCMALLOC:
        keep_freed_memory()
    config = GPT2Config(vocab_size=size.vocab, n_positions=shape.context, n_embd=size.width, n_layer=size.layers,
                        n_head=size.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
                        attn_implementation="sdpa")
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, **({"fused": True} if tuned else {}))
    forward = torch.compile(model) if compiled else model

    def step(tokens: Tensor, targets: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = forward(tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def matrices_step(size: Size, shape: Shape, *, dtype: torch.dtype) -> Step:
    """The step's matrix products alone: forward, gradient of the input, gradient of the weight."""
    keep_freed_memory()
    N, work = shape.tokens, []
    for inputs, outputs, times in size.matrices():
        x, w, dy = (torch.randn(*s).to(dtype) for s in ((N, inputs), (outputs, inputs), (N, outputs)))
        results = torch.empty(N, outputs, dtype=dtype), torch.empty_like(x), torch.empty_like(w)
        work.append((x, w, dy, results, times))

    def step(tokens: Tensor, targets: Tensor) -> float:
        for x, w, dy, (y, dx, dw), times in work:
            for _ in range(times):
                torch.mm(x, w.t(), out=y)
                torch.mm(dy, w, out=dx)
                torch.mm(dy.t(), x, out=dw)
        return 0.0

    return step


CONTENDERS: dict[str, Callable[[Size, Shape], Step]] = {
    f"{name} {precision}": functools.partial(make, **options(precision))
    for precision in ("bf16", "fp32") for name, make, options in (
        ("gptdist", gptdist_step, lambda p: {"precision": p}),
        ("reference", gptdist_step, lambda p: {"precision": p}),
        ("reference compiled", gptdist_step, lambda p: {"precision": p, "compiled": True}),
        ("hf", hf_step, lambda p: {"bf16": p == "bf16"}),
        ("hf compiled", hf_step, lambda p: {"bf16": p == "bf16", "compiled": True}),
        ("hf tuned", hf_step, lambda p: {"bf16": p == "bf16", "tuned": True}),
        ("products", matrices_step, lambda p: {"dtype": torch.bfloat16 if p == "bf16" else torch.float32}),
    )
}
DEFAULT = [name for name in CONTENDERS if name.endswith("fp32") or has_bf16(torch.device("cpu"))]
PRODUCTS = ("products bf16", "products fp32")


def environment(name: str) -> dict[str, str]:
    """What a contender's process has in its environment besides ours."""
    extra = {"GPTDIST_OPS": "reference"} if name.startswith("reference") else {}
    return extra | ({"LD_PRELOAD": TCMALLOC} if name.startswith("hf tuned") and TCMALLOC else {})


# A contender's process


def measure(name: str, size: Size, shape: Shape, steps: int, warmup: int) -> dict:
    """Seconds of each timed step, losses of all, peak memory in bytes."""
    torch.set_num_threads(physical_cores())
    step = CONTENDERS[name](size, shape)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(size.vocab, (BATCHES, shape.batch, shape.context + 1), generator=generator)
    seconds, losses = [], []
    for i in range(warmup + steps):
        batch = rows[i % BATCHES]
        start = time.perf_counter()
        losses.append(step(batch[:, :-1], batch[:, 1:].contiguous()))
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds[warmup:], "losses": losses, "peak_bytes": peak}


def run_contender(name: str, args: argparse.Namespace, shape: Shape, *, timeout_s: float | None = None,
                  before: Callable[[], None] | None = None) -> dict:
    """`measure` in a process of its own, which first calls `before`.

    Raises SystemExit with the end of its errors if it fails, subprocess.TimeoutExpired if it takes longer.
    """
    command = [sys.executable, "-m", "benchmarks.train_cpu", "--worker", name, "--shapes", str(shape),
               *(word for option in ("steps", "warmup", "layers", "width", "heads", "vocab")
                 for word in (f"--{option}", str(getattr(args, option))))]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment(name), capture_output=True, text=True,
                          timeout=timeout_s, preexec_fn=before)
    if done.returncode:
        raise SystemExit(f"train_cpu: {name} failed at {shape}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# The report


@dataclass
class Result:
    """Of one contender and shape, over all rounds."""

    seconds: list[float]
    losses: list[float]
    peak_bytes: int

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def collect(args: argparse.Namespace, shape: Shape) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for number in range(args.rounds):
        for name in args.only:
            found = run_contender(name, args, shape)
            print(f"{shape}, round {number + 1}, {name}: {statistics.median(found['seconds']):.3f} s a step, losses "
                  f"{found['losses'][0]:.3f} to {found['losses'][-1]:.3f}", file=sys.stderr)
            known = results.setdefault(name, Result([], found["losses"], 0))
            known.seconds += found["seconds"]
            known.peak_bytes = max(known.peak_bytes, found["peak_bytes"])
    return results


def limit_s(results: dict[str, Result], size: Size, shape: Shape, dtype: str) -> float | None:
    """Seconds of the step if there were nothing but matrix products and attention, at the products' rate."""
    products = results.get(f"products {dtype}")
    if products is None:
        return None
    return products.median_s * (1 + size.attention_flops(shape) / size.matrix_flops(shape))


def table(results: dict[str, Result], size: Size, shape: Shape) -> list[str]:
    ours = next((name for name in ("gptdist bf16", "gptdist fp32") if name in results), None)
    lines = [f"## B = {shape.batch}, T = {shape.context}", "",
             f"| | tokens/s | ms a step | {f'{ours} is faster' if ours else ''} | of the limit | peak memory, GB |",
             "|---|---|---|---|---|---|"]
    for name, result in results.items():
        if name in PRODUCTS:
            rate = size.matrix_flops(shape) / result.median_s / 1e9
            lines.append(f"| {name} | | {result.median_s * 1e3:.0f} | | {rate:.0f} GF/s | |")
            continue
        limit = limit_s(results, size, shape, "fp32" if name.endswith("fp32") else "bf16")
        share = f"{limit / result.median_s:.0%}" if limit else ""
        ratio = f"{result.median_s / results[ours].median_s:.2f}" if ours else ""
        lines.append(f"| {name} | {shape.tokens / result.median_s:.0f} | {result.median_s * 1e3:.0f} | {ratio} "
                     f"| {share} | {result.peak_bytes / 1e9:.2f} |")
    return [*lines, ""]


def publish(lines: list[str], output: Path | None) -> None:
    """Print a report, and write it to `output` where that is given."""
    text = "\n".join(lines)
    print(text)
    if output:
        output.write_text(text)


def add_size(parser: argparse.ArgumentParser) -> None:
    """Options of a Size; GPT-2 124M without them."""
    for name, default in (("layers", 12), ("width", 768), ("heads", 12), ("vocab", VOCAB)):
        parser.add_argument(f"--{name}", type=int, default=default)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=[Shape(4, 64), Shape(4, 256), Shape(1, 1024)])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=DEFAULT, metavar="NAME",
                        help=f"contenders: {', '.join(CONTENDERS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a round")
    parser.add_argument("--warmup", type=int, default=3)
    add_size(parser)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = Size(args.layers, args.width, args.heads, args.vocab)
    if args.worker:
        print(json.dumps(measure(args.worker, size, args.shapes[0], args.steps, args.warmup)))
        return
    allocator = "tcmalloc" if TCMALLOC else "glibc told to keep freed memory, for want of tcmalloc"
    lines = ["# Training on a CPU", "",
             f"{describe('benchmarks.train_cpu')}. {size.layers} layers, width {size.width}, {size.heads} heads, "
             f"vocabulary {size.vocab}; medians of {args.rounds} x {args.steps} steps; torch {torch.__version__}; "
             f"hf tuned with {allocator}.", ""]
    for shape in args.shapes:
        lines += table(collect(args, shape), size, shape)
    publish(lines, args.output)


if __name__ == "__main__":
    main()
