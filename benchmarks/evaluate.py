"""How much faster evaluation is batched by length than one request at a time.

    python -m benchmarks.evaluate [--checkpoint RUN] [--items 64] [--rounds 5]

Multiple choice and cloze of the embedded sets (gptdist/evaluate/embedded_sets.py), scored by both in alternation in one
process, in its own processor time, which other programs disturb least; the ratio is the
median of the rounds' own. Without --checkpoint: models with random weights, whose speed is that of trained ones: the
quickstart's, and one as GPT-2 124M with --large. The aim is a ratio of 3 or more.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.tokenize import describe
from gptdist.checkpoint.layout import resolve
from gptdist.config import Config, ModelConfig, TrainConfig
from gptdist.data.tokenizer import build_tokenizer
from gptdist.evaluate.embedded_sets import embedded_set
from gptdist.evaluate.scorer import BATCH_TOKENS, Scorer, open_scorer
from gptdist.evaluate.suite import Options, run_task
from gptdist.model import build_meta
from gptdist.parallel.strategies import make_strategy
from gptdist.parallel.world import World

QUICKSTART = ModelConfig(vocab_size=257, context=128, width=128, n_layers=4, n_heads=4)
GPT2 = ModelConfig(vocab_size=50257, context=1024, width=768, n_layers=12, n_heads=12)


def random_scorer(model: ModelConfig) -> Scorer:
    """Untrained weights; a token is a byte."""
    config = Config(model=model, train=TrainConfig(precision="fp32", tokens_per_step=model.context))
    strategy = make_strategy(World(0, 1, torch.device("cpu"), "single", None), config)
    strategy.prepare(build_meta(model).eval(), None)
    return Scorer(strategy, build_tokenizer("bytes"))


def seconds(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def compare(scorer: Scorer, name: str, items: int, rounds: int) -> None:
    task, options = embedded_set(name), Options(limit=items, skip_bad=True)

    def run(batch_tokens: int) -> dict:
        scorer.batch_tokens = batch_tokens
        return run_task(scorer, task, options)

    results = {size: run(size) for size in (1, BATCH_TOKENS)}
    for metric, value in results[1]["metrics"].items():
        assert abs(value - results[BATCH_TOKENS]["metrics"][metric]) <= 1e-3 * abs(value) + 1e-4, metric
    times = [(seconds(lambda: run(1)), seconds(lambda: run(BATCH_TOKENS))) for _ in range(rounds)]
    single, batched = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    print(f"| {name} | {items} | {single:.3f} | {batched:.3f} | {items / batched:,.0f} | {ratio:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint")
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="also a model as GPT-2 124M")
    options = parser.parse_args()
    print(describe("benchmarks.evaluate"))
    scorers = {"the quickstart's model": random_scorer(QUICKSTART)}
    if options.checkpoint:
        scorers = {options.checkpoint: open_scorer(resolve(Path(options.checkpoint)))}
    if options.large:
        scorers["GPT-2 124M"] = random_scorer(GPT2)
    for name, scorer in scorers.items():
        print(f"\n{name}\n\n| set | items | one by one, s | batched, s | items per s | ratio |\n"
              f"| --- | ---: | ---: | ---: | ---: | ---: |")
        for task in ("stdlib-choice", "stdlib-cloze"):
            compare(scorer, task, options.items, options.rounds)


if __name__ == "__main__":
    main()
