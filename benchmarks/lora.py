"""Fine-tuning adapters beside fine-tuning all weights: seconds of a step, and memory.

    python -m benchmarks.lora [--layers 12] [--width 768] [--rank 16] [--batch 4] [--context 256] [--rounds 9]

A round is a step of each in alternating order, on the same tokens: forward, backward, gradient norm, AdamW. Seconds and
ratios are medians over the rounds, with the range. Memory is that of a process of its own which takes three steps: what
it holds between steps (weights, optimizer), and its peak (on a GPU as the allocator counts it, on a CPU resident
memory, beyond what the process had before it made the model).
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.tokenize import describe
from gptdist import config as config_module
from gptdist.model import build
from gptdist.optim.adamw import build_adamw
from gptdist.parallel.strategies import Single, Strategy
from gptdist.parallel.world import World

KINDS = ("full", "lora")
MEMORY_STEPS = 3


def make_strategy(kind: str, options: argparse.Namespace) -> Strategy:
    config = config_module.load(None, [
        "--task.name=instruct", "--model.vocab_size=50257", f"--model.context={options.context}",
        f"--model.width={options.width}", f"--model.n_layers={options.layers}",
        f"--model.n_heads={max(1, options.width // 64)}", f"--train.precision={options.precision}",
        f"--lora.rank={options.rank if kind == 'lora' else 0}", f"--lora.targets={options.targets}"])
    strategy = Single(World(0, 1, torch.device(options.device), "single", None), config)
    strategy.prepare(build(config), lambda parameters: build_adamw(parameters, config.optim))
    return strategy


def take_step(strategy: Strategy, options: argparse.Namespace, number: int) -> float:
    """Seconds of one step."""
    generator = torch.Generator().manual_seed(number)
    rows = torch.randint(0, 50257, (options.batch, options.context + 1), generator=generator).to(options.device)
    tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    synchronize(options.device)
    started = time.perf_counter()
    with strategy.micro_batch(is_last=True):
        strategy.backward(strategy(tokens, targets).sum(), targets.numel())
    strategy.grad_norm()
    strategy.apply(1e-4, 1.0)
    synchronize(options.device)
    return time.perf_counter() - started


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def measure_memory(kind: str, options: argparse.Namespace) -> None:
    """Print (bytes held between steps, bytes at the peak) of a process that does nothing else."""
    before = peak_bytes(options.device)
    strategy = make_strategy(kind, options)
    for number in range(MEMORY_STEPS):
        take_step(strategy, options, number)
    held = sum(tensor.nbytes for tensor in strategy.state().values())
    print(held, peak_bytes(options.device) - before)


def peak_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: a process begins with its parent's maximum there.
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def memory_of(kind: str) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-m", "benchmarks.lora", *sys.argv[1:], "--memory", kind],
                          capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parent.parent)
    held, peak = map(int, done.stdout.split())
    return held, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="attn.qkv|attn.proj|mlp.fc|mlp.proj")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", choices=KINDS, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.memory:
        measure_memory(options.memory, options)
        return
    print(describe("benchmarks.lora"))
    print(f"load average before: {' '.join(f'{x:.1f}' for x in os.getloadavg())} (trust no timing of a busy machine)")
    strategies = {kind: make_strategy(kind, options) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(-1, options.rounds):  # the first round makes the optimizers' state and is not counted
        for kind in KINDS if number % 2 else KINDS[::-1]:
            taken = take_step(strategies[kind], options, number + 1)
            seconds[kind] += [taken] * (number >= 0)
    for kind, strategy in strategies.items():
        trained = sum(p.numel() for _, p in strategy.trainable())
        taken = seconds[kind]
        held, peak = memory_of(kind)
        print(f"  {kind:5} {trained:12,} of {strategy.n_parameters:,} parameters trained   "
              f"{statistics.median(taken):7.3f} s a step ({min(taken):.3f} to {max(taken):.3f})   "
              f"{held / 1e6:8.0f} MB held, {peak / 1e6:8.0f} MB at the peak")
    ratios = [a / b for a, b in zip(seconds["lora"], seconds["full"], strict=True)]
    print(f"  lora / full: {statistics.median(ratios):.2f} of the time ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"load average after: {' '.join(f'{x:.1f}' for x in os.getloadavg())}")


if __name__ == "__main__":
    main()
