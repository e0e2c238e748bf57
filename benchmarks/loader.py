"""How many tokens per second one process loads from the page cache.

    python -m benchmarks.loader [--context 1024] [--sequences 512] [--workers 0 1 2] [--seconds 2] [--run RUN_DIR]

Windows of a uint16 dataset in a temporary directory, shuffled, as int64 tokens and targets, hashes included.
The aim is more than 50 million tokens per second and process. With --run, also the share of step time that a training
run spent waiting for data, from its metrics (aim: below 1 %).
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.tokenize import describe
from gptdist.data.format import TokenDataset
from gptdist.data.loader import Prefetcher, PretrainSource
from gptdist.data.writer import write_dataset
from gptdist.metrics import read_rows


def make_dataset(path: Path, n_tokens: int, n_shards: int) -> TokenDataset:
    """Write random tokens, in documents of 1000, to `n_shards` shards."""
    tokens = np.random.default_rng(0).integers(0, 50257, n_tokens, dtype=np.uint16)
    settings = {"tokenizer_hash": "none", "vocab_size": 50257, "eot": 50256, "shard_tokens": n_tokens // n_shards}
    with write_dataset(path, **settings) as writer:
        for start in range(0, n_tokens, 1000):
            writer.add(tokens[start : start + 1000])
    return TokenDataset.open(path)


def measure(source: PretrainSource, workers: int, seconds: float) -> tuple[float, float]:
    """Return (tokens per second, share of the time the consumer waited)."""
    n_steps = 0
    with Prefetcher(source, workers=workers) as prefetcher:
        next(prefetcher)
        prefetcher.wait_s = 0.0
        started = time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds:
            next(prefetcher)
            n_steps += 1
    return n_steps * source.sequences_per_step * source.context / elapsed, prefetcher.wait_s / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--run", type=Path)
    options = parser.parse_args()
    print(describe("benchmarks.loader"))
    if options.run:
        shares = [row["data_wait_share"] for row in read_rows(options.run / "metrics.jsonl") if row["kind"] == "train"]
        print(f"{options.run}: waiting for data {statistics.fmean(shares):.3%} of step time over {len(shares)} steps, "
              f"median {statistics.median(shares):.3%}, worst step {max(shares):.2%}")
    with tempfile.TemporaryDirectory() as directory:
        for n_shards in (1, 8):
            dataset = make_dataset(Path(directory) / str(n_shards), options.tokens, n_shards)
            source = PretrainSource(
                dataset,
                context=options.context,
                sequences_per_step=options.sequences,
                micro_batch=options.micro_batch,
                seed=0,
            )
            for workers in options.workers:
                rate, waiting = measure(source, workers, options.seconds)
                print(f"{n_shards} shards, {workers} workers: {rate / 1e6:.0f} M tokens/s, waiting {waiting:.0%}")


if __name__ == "__main__":
    main()
