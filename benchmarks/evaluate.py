"""How much faster evaluation is batched than one request at a time.

    python -m benchmarks.evaluate [--checkpoint RUN] [--items 64] [--rounds 5] [--shots N] [--batch-tokens N] [--large]

Embedded sets (gptdist/evaluate/embedded_sets.py) of several kinds, scored by both in alternation in one process. A time
is that of the clock; the ratio, of which the aim is 3 or more, is the median of the rounds' own, and the ratio of
processor time stands beside it, which other programs disturb less, but which knows nothing of idle cores. Without
--checkpoint: models with random weights, whose speed is that of trained ones: the quickstart's, and one as GPT-2 124M
with --large.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.tokenize import describe
from gptdist.checkpoint.layout import resolve
from gptdist.config import Config, ModelConfig, TrainConfig
from gptdist.data.tokenizer import build_tokenizer
from gptdist.evaluate.embedded_sets import embedded_set
from gptdist.evaluate.scorer import BATCH_TOKENS, Request, Score, Scorer, open_scorer
from gptdist.evaluate.suite import Options, run_task
from gptdist.model import build_meta
from gptdist.parallel.strategies import make_strategy
from gptdist.parallel.world import World

QUICKSTART = ModelConfig(vocab_size=257, context=128, width=128, n_layers=4, n_heads=4)
GPT2 = ModelConfig(vocab_size=50257, context=1024, width=768, n_layers=12, n_heads=12)
SETS = ("stdlib-choice", "stdlib-cloze", "stdlib-classify")


class OneByOne(Scorer):
    """Gives the model one request at a time."""

    def score(self, requests: Sequence[Request], *, greedy: bool = False) -> list[Score]:
        return [super(OneByOne, self).score([request], greedy=greedy)[0] for request in requests]


def random_scorer(model: ModelConfig) -> Scorer:
    """Untrained weights; a token is a byte."""
    config = Config(model=model, train=TrainConfig(precision="fp32", tokens_per_step=model.context))
    strategy = make_strategy(World(0, 1, torch.device("cpu"), "single", None), config)
    strategy.prepare(build_meta(model).eval(), None)
    return Scorer(strategy, build_tokenizer("bytes"))


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """(by the clock, of processors)."""
    started = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def compare(scorer: Scorer, name: str, items: int, shots: int, rounds: int) -> None:
    task, options = embedded_set(name), Options(limit=items, shots=shots, skip_bad=True)
    single = OneByOne(scorer.strategy, scorer.tokenizer)
    results = [run_task(one, task, options)["metrics"] for one in (single, scorer)]
    for metric, value in results[0].items():
        assert abs(value - results[1][metric]) <= 1e-3 * abs(value) + 1e-4, metric
    times = [[seconds(lambda one=one: run_task(one, task, options)) for one in (single, scorer)] for _ in range(rounds)]
    alone, batched = (statistics.median(pair[i][0] for pair in times) for i in range(2))
    by_clock, by_processor = (statistics.median(one[i] / both[i] for one, both in times) for i in range(2))
    print(f"| {name} | {items} | {alone:.3f} | {batched:.3f} | {items / batched:,.0f} | {by_clock:.1f} | "
          f"{by_processor:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint")
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    parser.add_argument("--large", action="store_true", help="also a model as GPT-2 124M")
    parser.add_argument("--sets", nargs="+", default=SETS)
    options = parser.parse_args()
    print(f"{describe('benchmarks.evaluate')} {torch.get_num_threads()} threads of torch; load of the machine at the "
          f"start {os.getloadavg()[0]:.1f}.")
    scorers = {"the quickstart's model": random_scorer(QUICKSTART)}
    if options.checkpoint:
        scorers = {options.checkpoint: open_scorer(resolve(Path(options.checkpoint)))}
    if options.large:
        scorers["GPT-2 124M"] = random_scorer(GPT2)
    for name, scorer in scorers.items():
        scorer.batch_tokens = options.batch_tokens
        print(f"\n{name}\n\n| set | items | one by one, s | batched, s | items per s | ratio | of processor time |\n"
              f"| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for task in options.sets:
            compare(scorer, task, options.items, options.shots, options.rounds)


if __name__ == "__main__":
    main()
