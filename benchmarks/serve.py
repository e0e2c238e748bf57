"""gptdist serve under load: 16 clients against one after another, time to the first token, memory, hundreds at once.

    python -m benchmarks.serve [--shapes quickstart medium] [--dtype fp32] [--tokens N] [--rounds N] [--crowd N]
                               [--output FILE.md]

The server is a process of its own with random weights, asked over HTTP by this one. One after another and together
take turns, --rounds times; medians. The ratio by the server's own CPU time is what other programs on the machine
change less.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch

from benchmarks.tokenize import describe
from benchmarks.train_cpu import publish

SHAPES = {
    "quickstart": dict(context=128, width=128, n_layers=4, n_heads=4, vocab_size=512),
    "medium": dict(context=256, width=512, n_layers=8, n_heads=8, vocab_size=8192),
    "gpt2": dict(context=1024, width=768, n_layers=12, n_heads=12, vocab_size=50257),
}
CLIENTS = 16


@dataclass(frozen=True)
class Timed:
    """A number of requests."""

    wall_s: float
    cpu_s: float  # of the server
    n_tokens: int
    first_s: list[float]  # time to the first token of each

    @property
    def rate(self) -> float:
        return self.n_tokens / self.wall_s


def run_server(shape: str, dtype: str) -> None:
    """The process that is measured; prints its address."""
    from gptdist.config import ModelConfig
    from gptdist.data.tokenizer import Tokenizer, build_tokenizer
    from gptdist.model import LanguageModel
    from gptdist.parallel.host import set_up_process
    from gptdist.parallel.init import fill_initial_values
    from gptdist.serve.app import Api, Served
    from gptdist.serve.command import Server, listen
    from gptdist.serve.engine import Limits
    from gptdist.serve.guard import Rules

    set_up_process(torch.device("cpu"))
    model = LanguageModel(ModelConfig(**SHAPES[shape]))
    fill_initial_values(model, seed=0)
    model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]).eval()
    letters = build_tokenizer("bytes")
    more = {b"%06d" % i: i for i in range(257, SHAPES[shape]["vocab_size"])}  # every id has a text
    tokenizer = Tokenizer(name="numbers", ranks=letters.ranks | more, specials=letters.specials)
    api = Api(Served(name=shape, model=model, tokenizer=tokenizer), Limits(queue=1024), Rules())
    with listen("127.0.0.1", 0) as listener:
        Server(api, f"http://127.0.0.1:{listener.getsockname()[1]}").run(sockets=[listener])


async def ask(client: httpx.AsyncClient, i: int, n_tokens: int) -> float:
    """A streamed request of its own prompt; the time to its first token."""
    body = {"prompt": f"{i}: once upon a time", "max_tokens": n_tokens, "temperature": 1, "seed": i, "stream": True}
    started, first, last = time.perf_counter(), None, ""
    async with client.stream("POST", "/v1/completions", json=body) as stream:
        assert stream.status_code == 200, await stream.aread()
        async for line in stream.aiter_lines():
            if line:
                first = first or time.perf_counter() - started
                last = line
    assert last == "data: [DONE]", last
    return first


def cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mib(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:
        [kb] = [int(line.split()[1]) for line in file if line.startswith("VmHWM")]
    return kb / 1024


async def timed(client: httpx.AsyncClient, pid: int, numbers: range, n_tokens: int, at_once: int) -> Timed:
    before = cpu_s(pid)
    generated = await total(client)
    gate = asyncio.Semaphore(at_once)
    started = time.perf_counter()

    async def one(i: int) -> float:
        async with gate:
            return await ask(client, i, n_tokens)

    first = await asyncio.gather(*(one(i) for i in numbers))
    wall = time.perf_counter() - started
    return Timed(wall, cpu_s(pid) - before, await total(client) - generated, first)


async def total(client: httpx.AsyncClient) -> int:
    """Tokens generated so far."""
    for line in (await client.get("/metrics")).text.splitlines():
        if line.startswith("gptdist_generated_tokens_total "):
            return int(float(line.split()[1]))
    raise AssertionError("no such counter")


async def measure(address: str, pid: int, n_tokens: int, rounds: int, crowd: int) -> dict:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        await timed(client, pid, range(900, 903), n_tokens, 3)  # warm
        alone, together = [], []
        for k in range(rounds):  # by turns, so that what else runs here slows both alike
            numbers = range(1000 + 100 * k, 1000 + 100 * k + CLIENTS)
            alone.append(await timed(client, pid, numbers, n_tokens, 1))
            together.append(await timed(client, pid, range(numbers.start + 50, numbers.stop + 50), n_tokens, CLIENTS))
        memory = peak_mib(pid)
        many = await timed(client, pid, range(5000, 5000 + crowd), n_tokens // 4, crowd)
        middle = statistics.median
        return {
            "tokens_per_s_alone": middle(t.rate for t in alone),
            "tokens_per_s_together": middle(t.rate for t in together),
            "speed_up": middle(b.rate / a.rate for a, b in zip(alone, together, strict=True)),
            "cpu_speed_up": middle(b.n_tokens / b.cpu_s / (a.n_tokens / a.cpu_s)
                                   for a, b in zip(alone, together, strict=True)),
            "first_token_ms_alone": 1000 * middle(x for t in alone for x in t.first_s),
            "first_token_ms_together": 1000 * middle(x for t in together for x in t.first_s),
            "crowd": crowd, "crowd_tokens_per_s": many.rate, "crowd_first_token_s_max": max(many.first_s),
            "peak_mib": memory, "peak_mib_after_crowd": peak_mib(pid)}


def run_shape(shape: str, args: argparse.Namespace) -> dict:
    """What is measured of a server of this shape."""
    command = [sys.executable, "-m", "benchmarks.serve", "--server", "--shapes", shape, "--dtype", args.dtype]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            said = server.stdout.readline()
            if " at " not in said:
                raise SystemExit(f"serve: the server of shape {shape} did not start: {said or 'see its error above'}")
            address = said.split(" at ")[1].split(";")[0]
            found = asyncio.run(measure(address, server.pid, args.tokens, args.rounds, args.crowd))
        finally:
            server.terminate()
    if server.returncode:
        raise SystemExit(f"serve: the server of shape {shape} ended with exit code {server.returncode}")
    print(f"{shape}: {json.dumps({name: round(value, 2) for name, value in found.items()})}", file=sys.stderr)
    return found


def report(found: dict[str, dict]) -> list[str]:
    """The tables of what was measured, by shape."""
    names = " | ".join(found)
    lines = [f"| | {names} |", "|---|" + "---|" * len(found)]
    for label, text in (
        ("one after another, tokens/s", "{tokens_per_s_alone:.0f}"),
        (f"{CLIENTS} at once, tokens/s", "{tokens_per_s_together:.0f}"),
        ("faster together", "{speed_up:.1f}"),
        ("the same by the server's CPU time", "{cpu_speed_up:.1f}"),
        ("first token alone, ms", "{first_token_ms_alone:.1f}"),
        (f"first token, {CLIENTS} at once, ms", "{first_token_ms_together:.1f}"),
        ("peak memory, MiB", "{peak_mib:.0f}"),
        ("requests of a crowd, all at once", "{crowd}"),
        ("a crowd's tokens/s", "{crowd_tokens_per_s:.0f}"),
        ("its latest first token, s", "{crowd_first_token_s_max:.1f}"),
        ("peak memory after it, MiB", "{peak_mib_after_crowd:.0f}"),
    ):
        lines.append(f"| {label} | {' | '.join(text.format(**values) for values in found.values())} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["quickstart"], metavar="SHAPE",
                        help=f"{', '.join(SHAPES)} (default: quickstart)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--crowd", type=int, default=300, help="requests at once in the load test")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--server", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.server:
        run_server(args.shapes[0], args.dtype)
        return 0
    found = {shape: run_shape(shape, args) for shape in args.shapes}
    sizes = ("context", "width", "n_layers", "n_heads", "vocab_size")
    shapes = "; ".join(f"{name} of {', '.join(f'{size} {SHAPES[name][size]}' for size in sizes)}" for name in found)
    publish([
        "# Serving", "",
        f"{describe('benchmarks.serve')}; torch {torch.__version__}. Random weights in {args.dtype}: {shapes}. Each "
        f"of {CLIENTS} requests has a prompt of its own and {args.tokens} tokens, streamed; one after another and then "
        f"all at once, {args.rounds} times by turns; medians. The clients run on the same machine.",
        "", *report(found), ""],
        args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
