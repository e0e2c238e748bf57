"""Generation on a CPU: this project beside Hugging Face's `generate`, in tokens per second and share of the limit.

    python -m benchmarks.generate_cpu [--batches 1 8] [--prompt N] [--new N] [--only NAME ...] [--rounds N]
                                      [--repeats N] [--output FILE.md]

A GPT-2 of 124M (other sizes: --layers, --width, --heads, --vocab) with random weights continues prompts of random
tokens greedily, with a key and value cache. Each contender runs in a process of its own; contenders alternate,
`--rounds` times; medians over all timed continuations, prompt and all, divided by the new tokens of a row.

    gptdist bf16, fp32   Generator, as `gptdist generate --dtype bf16` runs it
    reference bf16       the same with GPTDIST_OPS=reference
    hf bf16, fp32        Hugging Face's GPT2LMHeadModel.generate (SDPA attention, dynamic cache)
    hf tuned             the same with tcmalloc where installed, else with glibc told to keep what is freed
    hf compiled          hf tuned with a static cache and torch.compile of the forward pass

hf tuned and compiled are in bf16, or in fp32 where the processor does not multiply bf16. The limit: a step reads every
weight of the matrix products and norms once, in bf16, at the bandwidth of a copy (read and
written bytes) by as many threads, measured in a process of its own in the same rounds. Last, the logits of a prompt
and of steps after it, ours and Hugging Face's in bf16, are compared with Hugging Face's in fp32. Needs the package
transformers (the test extra).
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import copy_bandwidth
from benchmarks.tokenize import describe
from benchmarks.train_cpu import ROOT, TCMALLOC, Size, add_size, publish
from gptdist.config import ModelConfig
from gptdist.convert.gpt2 import gpt2_name, group_qkv
from gptdist.generate import Generator, PagedCache, Sampling
from gptdist.model import LanguageModel, build_meta
from gptdist.parallel.host import has_bf16, keep_freed_memory, physical_cores

CONTEXT = 1024
COPY_BYTES = 256 << 20
BF16 = torch.bfloat16
NATIVE = BF16 if has_bf16(torch.device("cpu")) else torch.float32  # what the processor multiplies


@dataclass(frozen=True)
class Work:
    """Rows, tokens of each prompt, tokens to continue it with."""

    batch: int
    prompt: int
    new: int

    def prompts(self, vocab: int) -> Tensor:
        """(batch, prompt) int64"""
        return torch.randint(vocab, (self.batch, self.prompt), generator=torch.Generator().manual_seed(self.batch))


class NoText:
    """In a tokenizer's place: nothing ends a text, and tokens have none."""

    eot = -1

    def token_bytes(self, token: int) -> bytes:
        return b""


# models with the same weights


def hf_model(size: Size, dtype: torch.dtype):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=size.vocab, n_positions=CONTEXT, n_embd=size.width, n_layer=size.layers,
                        n_head=size.heads, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config).eval().to(dtype)


def gptdist_model(size: Size, dtype: torch.dtype) -> LanguageModel:
    config = ModelConfig(context=CONTEXT, width=size.width, n_layers=size.layers, n_heads=size.heads,
                         vocab_size=size.vocab)
    model = build_meta(config).to(dtype).to_empty(device="cpu").eval()
    theirs = hf_model(size, dtype).state_dict()
    for name, parameter in model.named_parameters():
        value = theirs[gpt2_name(name)]
        if name.startswith("blocks.") and name.endswith("weight") and value.dim() == 2:
            value = value.t()  # theirs is (in, out)
        if ".attn.qkv." in name:
            value = group_qkv(value, config)
        parameter.data.zero_()
        parameter.data[:len(value)] = value
    return model


# A contender gives the function of one continuation: prompts (B, T) -> new tokens of every row.
Continue = Callable[[Tensor], list[list[int]]]


def gptdist_continue(size: Size, work: Work, *, dtype: torch.dtype = BF16) -> Continue:
    generator = Generator(gptdist_model(size, dtype), NoText())
    sampling = Sampling(max_new_tokens=work.new, temperature=0)

    def run(prompts: Tensor) -> list[list[int]]:
        return [done.tokens for done in generator.generate(prompts.tolist(), sampling, batch_size=len(prompts))]

    return run


def hf_continue(size: Size, work: Work, *, dtype: torch.dtype = NATIVE, tuned: bool = False,
                compiled: bool = False) -> Continue:
    if (tuned or compiled) and not TCMALLOC:
        keep_freed_memory()
    model, options = hf_model(size, dtype), {}
    if compiled:
        options["cache_implementation"] = "static"
        model.forward = torch.compile(model.forward)

    @torch.no_grad()
    def run(prompts: Tensor) -> list[list[int]]:
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=work.new, do_sample=False,
                             pad_token_id=0, **options)
        return out[:, work.prompt:].tolist()

    return run


CONTENDERS: dict[str, Callable[[Size, Work], Continue]] = {
    "gptdist bf16": gptdist_continue,
    "gptdist fp32": functools.partial(gptdist_continue, dtype=torch.float32),
    "hf bf16": functools.partial(hf_continue, dtype=BF16),
    "hf fp32": functools.partial(hf_continue, dtype=torch.float32),
    "hf tuned": functools.partial(hf_continue, tuned=True),
    "hf compiled": functools.partial(hf_continue, compiled=True),
    "reference bf16": gptdist_continue,
}
COPY, LOGITS = "copy", "logits"  # what workers do besides


def environment(name: str) -> dict[str, str]:
    """What a contender's process has in its environment besides ours."""
    extra = {"GPTDIST_OPS": "reference"} if name.startswith("reference") else {}
    return extra | ({"LD_PRELOAD": TCMALLOC} if name in ("hf tuned", "hf compiled") and TCMALLOC else {})


# workers


def measure(name: str, size: Size, work: Work, repeats: int) -> dict:
    """Seconds of each timed continuation, after one that warms up."""
    run, prompts, seconds = CONTENDERS[name](size, work), work.prompts(size.vocab), []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        tokens = run(prompts)
        seconds.append(time.perf_counter() - start)
    assert [len(row) for row in tokens] == [work.new] * work.batch
    return {"seconds": seconds[1:]}


@torch.no_grad()
def logits_of(model, tokens: Tensor, prompt: int) -> Tensor:
    """(B, T - prompt + 1, vocab) fp32: after the prompt, and after each later token, which is a step of its own."""
    ours = isinstance(model, LanguageModel)
    B = len(tokens)
    cache = PagedCache(model.config, B, CONTEXT, device=tokens.device, dtype=model.wte.weight.dtype) if ours else None
    found, start = [], 0
    for end in range(prompt, tokens.shape[1] + 1):
        part = tokens[:, start:end]
        if ours:
            cache.reserve(end - start)
            found.append(model(part, cache=cache, at=torch.full((B,), end - start - 1)))
            cache.advance(torch.full((B,), end - start))
        else:
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[:, -1].float())
        start = end
    return torch.stack(found, 1)


def compare_logits(size: Size, work: Work) -> dict[str, float]:
    """Root mean square of the errors of both in bf16, beside fp32; of the logits themselves; largest in fp32."""
    tokens = Work(work.batch, work.prompt + 8, 0).prompts(size.vocab)
    exact = logits_of(hf_model(size, torch.float32), tokens, work.prompt)

    def error(model) -> Tensor:
        return logits_of(model, tokens, work.prompt) - exact

    return {"ours": error(gptdist_model(size, BF16)).square().mean().sqrt().item(),
            "hf": error(hf_model(size, BF16)).square().mean().sqrt().item(),
            "ours fp32": error(gptdist_model(size, torch.float32)).abs().max().item(),
            "logits": exact.square().mean().sqrt().item()}


def worker(name: str, size: Size, work: Work, repeats: int) -> dict:
    torch.set_num_threads(physical_cores())
    if name == COPY:
        return {"bandwidth": copy_bandwidth(torch.device("cpu"), COPY_BYTES, 10)}
    return compare_logits(size, work) if name == LOGITS else measure(name, size, work, repeats)


def run_worker(name: str, args: argparse.Namespace, batch: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.generate_cpu", "--worker", name, "--batches", str(batch),
               *(word for option in ("prompt", "new", "repeats", "layers", "width", "heads", "vocab")
                 for word in (f"--{option}", str(getattr(args, option))))]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment(name), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"generate_cpu: {name} failed at batch {batch}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# the report


def weight_bytes(size: Size) -> int:
    """Bytes of the weights that a step reads, in bf16: matrices, biases and norms, not the embeddings' few rows."""
    matrices = sum((inputs + 1) * outputs * times for inputs, outputs, times in size.matrices()) - size.vocab
    return 2 * (matrices + (2 * size.layers + 1) * 2 * size.width)


def collect(args: argparse.Namespace, batch: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of every contender's continuations; bytes per second of a copy, the median of all rounds."""
    seconds: dict[str, list[float]] = {}
    bandwidths = []
    for number in range(args.rounds):
        bandwidths.append(run_worker(COPY, args, batch)["bandwidth"])
        for name in args.only or CONTENDERS:
            found = run_worker(name, args, batch)["seconds"]
            token_ms = statistics.median(found) / args.new * 1e3
            print(f"batch {batch}, round {number + 1}, {name}: {token_ms:.1f} ms a token", file=sys.stderr)
            seconds.setdefault(name, []).extend(found)
    return seconds, statistics.median(bandwidths)


def table(seconds: dict[str, list[float]], bandwidth: float, size: Size, batch: int, new: int) -> list[str]:
    step_s = {name: statistics.median(times) / new for name, times in seconds.items()}
    limit_s, ours = weight_bytes(size) / bandwidth, step_s.get("gptdist bf16")
    lines = [f"## Batch {batch}", "",
             f"The limit is {limit_s * 1e3:.1f} ms: {weight_bytes(size) / 1e6:.0f} MB of weights, a copy moves "
             f"{bandwidth / 1e9:.1f} GB/s.", "",
             "| | ms a step | tokens/s | gptdist bf16 is faster | of the limit |", "|---|---|---|---|---|"]
    for name, time_s in step_s.items():
        ratio = f"{time_s / ours:.2f}" if ours else ""
        lines.append(f"| {name} | {time_s * 1e3:.1f} | {batch / time_s:.1f} | {ratio} | {limit_s / time_s:.0%} |")
    return [*lines, ""]


def logits_line(found: dict[str, float]) -> str:
    verdict = "no larger" if found["ours"] <= found["hf"] else "LARGER"
    return (f"Logits of root mean square {found['logits']:.3g}, after a prompt and 8 steps: in bf16 ours are off those "
            f"of Hugging Face in fp32 by {found['ours']:.3g} (root mean square), Hugging Face's by {found['hf']:.3g}; "
            f"ours is {verdict}. In fp32 ours are off by at most {found['ours fp32']:.2g}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to continue it with")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, metavar="NAME",
                        help=f"contenders: {', '.join(CONTENDERS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="timed continuations of a round")
    add_size(parser)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", choices=[*CONTENDERS, COPY, LOGITS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = Size(args.layers, args.width, args.heads, args.vocab)
    if args.worker:
        print(json.dumps(worker(args.worker, size, Work(args.batches[0], args.prompt, args.new), args.repeats)))
        return
    lines = ["# Generation on a CPU", "",
             f"{describe('benchmarks.generate_cpu')}. {size.layers} layers, width {size.width}, {size.heads} heads, "
             f"vocabulary {size.vocab}; prompts of {args.prompt} tokens, {args.new} new ones; medians of "
             f"{args.rounds} x {args.repeats} continuations; torch {torch.__version__}.", ""]
    for batch in args.batches:
        lines += table(*collect(args, batch), size, batch, args.new)
        lines += [logits_line(run_worker(LOGITS, args, batch)), ""]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
