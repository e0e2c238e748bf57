"""What `gptdist plan` says of published runs, beside what they measured.

    python -m benchmarks.plan_published [--fit]

Runs marked `fit` gave the constants of gptdist.plan.speed.EFFICIENCY (--fit finds them again); the others are held out.
Architectures that are not GPT-2's are taken as a GPT of the same width, depth, heads and number of parameters: three
matrices of a gated MLP of F units are two of 1.5 F. Where a source leaves out the micro-batch or links, so it says.
"""

import argparse
import itertools
import math
import statistics
from dataclasses import dataclass, replace

from gptdist.config import Config, ModelConfig
from gptdist.plan import Plan, make_plan, speed
from gptdist.plan.devices import find_device
from gptdist.plan.speed import Efficiency

# Sources
FOUNDRY = "MosaicML, llm-foundry, scripts/train/benchmarking/README.md"
TITAN = "PyTorch, torchtitan, docs/performance.md (64 A100; links not said)"
FMS = "IBM, fms-fsdp, README.md (128 A100; links not said)"
MEGATRON = "Narayanan et al. 2021 (arXiv 2104.04473v5), Table 1 (micro-batch not said: 4); DDP x tensor there"
ZERO3 = "Narayanan et al. 2021 (arXiv 2104.04473v5), Table 2, ZeRO-3"
NANOGPT = "Karpathy, nanoGPT README: about 4 days for config/train_gpt2.py's 600,000 steps"
LLMC = "Karpathy, llm.c, scripts/run_gpt2_124M.sh: about 300 ms a step of 524,288 tokens"
LLMC_XL = "Karpathy, llm.c, scripts/run_gpt2_1558M.sh: 2.80 s a step of 1,048,576 tokens"
LLAMA = "Touvron et al. 2023 (arXiv 2302.13971), section 2.4: around 380 tokens/s/GPU; tensor parallel there"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published run; `measured` in tokens per second and device."""

    name: str
    source: str
    device: str
    world: int
    measured: float
    width: int
    layers: int
    heads: int
    context: int = 2048
    vocab: int = 50368
    hidden: int = 0  # of the two matrices of an MLP; 0: 4 width
    kv_heads: int = 0
    tied: bool = True
    micro_batch: int
    count: int = 1  # micro-batches of a step
    strategy: str = "fsdp"
    tensor: int = 1
    recompute: str | int = "none"  # as train.activation_checkpointing
    fit: bool = False

    def plan(self) -> Plan:
        sequences, base = self.micro_batch * self.count * (self.world // self.tensor), Config()
        model = ModelConfig(
            width=self.width, n_layers=self.layers, n_heads=self.heads, n_kv_heads=self.kv_heads or self.heads,
            context=self.context, vocab_size=self.vocab, tied=self.tied, bias=False,
            mlp_ratio=(self.hidden or 4 * self.width) / self.width, positions="learned" if self.tied else "rope")
        train = replace(base.train, tokens_per_step=sequences * self.context, micro_batch=self.micro_batch,
                        precision="bf16", activation_checkpointing=self.recompute)
        parallel = replace(base.parallel, strategy=self.strategy, tensor=self.tensor)
        return make_plan(replace(base, model=model, train=train, parallel=parallel), self.world,
                         find_device(self.device))


MPT = {"125m": (768, 12, 12), "350m": (1024, 24, 16), "760m": (1536, 24, 12), "1b": (2048, 24, 16),
       "3b": (2560, 32, 20), "7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 48, 56), "70b": (8192, 80, 64)}


def mpt(size: str, context: int, world: int, device: str, micro_batch: int, count: int, recompute: bool,
        measured: float, fit: bool = False) -> Run:
    width, layers, heads = MPT[size]
    return Run(name=f"MPT {size}, {context} tokens", source=FOUNDRY, device=device, world=world, measured=measured,
               width=width, layers=layers, heads=heads, context=context, micro_batch=micro_batch, count=count,
               recompute="full" if recompute else "none", fit=fit)


def llama(name: str, source: str, world: int, micro_batch: int, recompute: str | int, measured: float, *,
          context: int = 4096, vocab: int = 32000, strategy: str = "fsdp") -> Run:
    width, layers, heads, kv_heads, gated = {
        "Llama 2 7B": (4096, 32, 32, 32, 11008), "Llama 2 13B": (5120, 40, 40, 40, 13824),
        "Llama 34B": (8192, 48, 64, 8, 22016), "Llama 2 70B": (8192, 80, 64, 8, 28672),
        "Llama 3 8B": (4096, 32, 32, 8, 14336), "Llama 3 70B": (8192, 80, 64, 8, 28672),
        "Llama 65B": (8192, 80, 64, 64, 22016)}[name]
    return Run(name=name, source=source, device="a100-80gb", world=world, measured=measured, width=width, layers=layers,
               heads=heads, kv_heads=kv_heads, hidden=gated * 3 // 2, context=context, vocab=vocab, tied=False,
               micro_batch=micro_batch, recompute=recompute, strategy=strategy)


def narayanan(name: str, source: str, shape: tuple[int, int, int], world: int, tensor: int, batch: int, tflops: float,
              micro_batch: int, strategy: str) -> Run:
    """A row in TFLOP/s, which count the recomputation: their equation 3, over a token."""
    width, layers, heads = shape
    per_token = 96 * layers * width**2 * (1 + 2048 / (6 * width) + 51200 / (16 * layers * width))
    return Run(name=name, source=source, device="a100-80gb", world=world, measured=tflops * 1e12 / per_token,
               width=width, layers=layers, heads=heads, vocab=51200, micro_batch=micro_batch, tensor=tensor,
               count=max(1, batch * tensor // world // micro_batch), recompute="full", strategy=strategy)


RUNS = [
    mpt("125m", 2048, 8, "a100-80gb", 40, 2, False, 142830, fit=True),
    mpt("1b", 2048, 8, "a100-80gb", 14, 4, False, 20513, fit=True),
    mpt("7b", 2048, 8, "a100-80gb", 6, 2, False, 4641, fit=True),
    mpt("1b", 16384, 8, "a100-80gb", 2, 4, False, 9956, fit=True),
    mpt("760m", 2048, 8, "h100-80gb", 24, 2, False, 63147, fit=True),
    mpt("1b", 2048, 8, "h100-80gb", 14, 1, False, 45455, fit=True),
    mpt("7b", 2048, 8, "h100-80gb", 6, 1, False, 10643, fit=True),
    mpt("1b", 16384, 8, "h100-80gb", 2, 4, False, 19649, fit=True),
    mpt("350m", 2048, 8, "a100-80gb", 32, 2, False, 58782),
    mpt("760m", 2048, 8, "a100-80gb", 24, 2, False, 32434),
    mpt("3b", 2048, 8, "a100-80gb", 10, 2, False, 10811),
    mpt("7b", 16384, 8, "a100-80gb", 4, 2, True, 2453),
    mpt("13b", 2048, 8, "a100-80gb", 2, 3, False, 2262),
    mpt("13b", 2048, 128, "a100-40gb", 16, 1, True, 1972),
    mpt("30b", 2048, 8, "a100-80gb", 3, 21, True, 916),
    mpt("30b", 2048, 128, "a100-40gb", 6, 1, True, 865),
    mpt("70b", 2048, 64, "a100-80gb", 8, 4, True, 410),
    mpt("70b", 2048, 64, "a100-40gb", 2, 1, True, 276),
    mpt("3b", 2048, 64, "h100-80gb", 6, 3, False, 22525),
    mpt("7b", 8192, 8, "h100-80gb", 8, 2, True, 6935),
    mpt("13b", 2048, 8, "h100-80gb", 2, 1, False, 4792),
    mpt("13b", 2048, 64, "h100-80gb", 2, 1, False, 4800),
    mpt("30b", 2048, 32, "h100-80gb", 14, 3, True, 2308),
    mpt("70b", 2048, 64, "h100-80gb", 8, 4, True, 1039),
    Run(name="GPT-2 124M", source=LLMC, device="a100-80gb", world=8, measured=524_288 / 0.3 / 8, width=768,
        layers=12, heads=12, context=1024, vocab=50257, micro_batch=64, strategy="zero1"),
    Run(name="GPT-2 124M", source=NANOGPT, device="a100-40gb", world=8, measured=600_000 * 491_520 / (4 * 86400) / 8,
        width=768, layers=12, heads=12, context=1024, vocab=50257, micro_batch=12, count=5, strategy="ddp"),
    Run(name="GPT-2 1558M", source=LLMC_XL, device="h100-80gb", world=8, measured=1_048_576 / 2.8 / 8,
        width=1600, layers=48, heads=25, context=1024, vocab=50257, micro_batch=16, count=8, strategy="zero1"),
    llama("Llama 2 7B", FMS, 128, 2, "none", 3760, strategy="hsdp"),
    llama("Llama 2 13B", FMS, 128, 1, "none", 1700, strategy="hsdp"),
    llama("Llama 34B", FMS, 128, 8, "full", 772),
    llama("Llama 2 70B", FMS, 128, 6, "full", 380),
    llama("Llama 3 8B", TITAN, 64, 1, 2, 2904, context=8192, vocab=128256),
    llama("Llama 3 70B", TITAN, 64, 1, "full", 331, context=8192, vocab=128256),
    llama("Llama 2 13B", TITAN, 64, 2, "none", 2162),
    llama("Llama 2 70B", TITAN, 64, 2, "full", 353),
    llama("Llama 65B", LLAMA, 2048, 1, "none", 380, context=2048),
    narayanan("GPT 1.7B", MEGATRON, (2304, 24, 24), 32, 1, 512, 137, 4, "fsdp"),
    narayanan("GPT 3.6B", MEGATRON, (3072, 30, 32), 64, 2, 512, 138, 4, "fsdp"),
    narayanan("GPT 7.5B", MEGATRON, (4096, 36, 32), 128, 4, 512, 142, 4, "fsdp"),
    narayanan("GPT 18.4B", MEGATRON, (6144, 40, 48), 256, 8, 1024, 135, 4, "fsdp"),
    narayanan("GPT 175B", ZERO3, (12288, 96, 96), 384, 1, 1536, 144, 4, "zero3"),
    narayanan("GPT 175B", ZERO3, (12288, 96, 96), 1536, 1, 1536, 44, 1, "zero3"),
    narayanan("GPT 530B", ZERO3, (20480, 105, 128), 640, 1, 2560, 138, 4, "zero3"),
    narayanan("GPT 530B", ZERO3, (20480, 105, 128), 2240, 1, 2240, 48, 1, "zero3"),
]


def predicted(run: Run) -> float:
    """Tokens per second and device."""
    return run.plan().tokens_per_s / run.world


def error(run: Run) -> float:
    return predicted(run) / run.measured - 1


def fit(generation: str) -> Efficiency:
    """The constants with the least squared error of log speed over the runs marked `fit`."""
    before = speed.EFFICIENCY[generation]
    runs = [run for run in RUNS if run.fit and run.device.startswith(generation)]
    plans = [(run, run.plan()) for run in runs]
    steps = [(math.log(run.measured), run, plan) for run, plan in plans]
    best = (math.inf, before)
    for products, attention, bandwidth in itertools.product(
            [x / 50 for x in range(25, 51)], [x / 20 for x in range(3, 16)], [x / 20 for x in range(2, 20)]):
        share = replace(before, products=products, attention=attention, bandwidth=bandwidth)
        total = 0.0
        for logarithm, run, plan in steps:
            time = plan.time
            seconds = (time.products * before.products / products + time.attention * before.attention / attention
                       + (time.memory + time.optimizer) * before.bandwidth / bandwidth + time.exposed)
            total += (math.log(plan.step.target_tokens / seconds / run.world) - logarithm) ** 2
        best = min(best, (total, share), key=lambda pair: pair[0])
    return best[1]


def table() -> list[str]:
    lines = ["| run | devices | strategy | measured, tokens/s/device | plan | error | source |",
             "|---|---|---|---|---|---|---|"]
    for run in RUNS:
        strategy = run.strategy + (f" x tensor {run.tensor}" if run.tensor > 1 else "")
        strategy += {"none": "", "full": ", recompute"}.get(run.recompute, ", recompute every 2nd")
        lines.append(f"| {run.name}{' (fit)' if run.fit else ''} | {run.world} x {run.device} | {strategy} | "
                     f"{run.measured:,.0f} | {predicted(run):,.0f} | {error(run):+.0%} | {run.source} |")
    return lines


def held_out() -> list[float]:
    return [abs(error(run)) for run in RUNS if not run.fit]


def report() -> list[str]:
    errors = held_out()
    return [*table(), "", f"Held out, {len(errors)} runs: median error {statistics.median(errors):.1%}, largest "
                          f"{max(errors):.0%}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="also find the constants again")
    if parser.parse_args().fit:
        for generation in speed.EFFICIENCY:
            print(generation, fit(generation))
    print("\n".join(report()))


if __name__ == "__main__":
    main()
