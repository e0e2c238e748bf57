"""How fast `prepare` is beside tiktoken alone, on the same text and threads.

    python -m benchmarks.tokenize [--megabytes 60] [--threads N] [--repeats 5] [--tokenizer gpt2|bpe:8192|PATH]

The text is the embedded corpus, repeated with a different first line each time so that the duplicate filter keeps
every copy. `tiktoken.encode_ordinary_batch` gets the documents as a list in memory; `prepare` reads them from a JSONL
file, cleans, hashes, tokenizes and writes shards. The two alternate; medians are compared.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from gptdist.data.corpus import embedded_documents
from gptdist.data.prepare import PrepareConfig, prepare
from gptdist.data.tokenizer import Tokenizer, build_tokenizer


def varied_documents(megabytes: float) -> list[str]:
    """Return about `megabytes` of documents, no two the same."""
    base = list(embedded_documents())
    copies = max(1, round(megabytes * 1e6 / sum(map(len, base))))
    return [f"Copy {copy}, document {i}\n\n{text}" for copy in range(copies) for i, text in enumerate(base)]


def time_tiktoken(tokenizer: Tokenizer, documents: list[str], threads: int) -> tuple[float, int]:
    """Return (seconds, tokens) of tiktoken alone."""
    started = time.perf_counter()
    encoded = tokenizer._encoding.encode_ordinary_batch(documents, num_threads=threads)
    seconds = time.perf_counter() - started
    return seconds, sum(map(len, encoded))


def time_prepare(source: Path, tokenizer_path: Path, threads: int, output: Path) -> tuple[float, int]:
    """Return (seconds, tokens without eot) of the whole of prepare except loading the tokenizer."""
    config = PrepareConfig(
        inputs=[str(source)], output=str(output), tokenizer=str(tokenizer_path), workers=threads, overwrite=True
    )
    report = prepare(config)
    return report["speed"]["pipeline_seconds"], report["tokens"] - report["documents"]


def describe(module: str = "benchmarks.tokenize") -> str:
    """Return hardware, date and command, as every result must carry."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{cpu}, {os.cpu_count()} cores; {date.today()}; python -m {module} {' '.join(sys.argv[1:])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokenizer", default="bpe:8192")
    options = parser.parse_args()
    print(describe())
    tokenizer = build_tokenizer(options.tokenizer, embedded_documents())
    documents = varied_documents(options.megabytes)
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    alone, whole = [], []
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "text.jsonl"
        source.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))
        tokenizer.save(Path(directory) / "tokenizer")
        for _ in range(options.repeats):
            seconds, n_alone = time_tiktoken(tokenizer, documents, options.threads)
            alone.append(seconds)
            seconds, n_whole = time_prepare(
                source, Path(directory) / "tokenizer", options.threads, Path(directory) / "dataset"
            )
            whole.append(seconds)
            if n_alone != n_whole:
                raise AssertionError(f"prepare wrote {n_whole} tokens, tiktoken made {n_alone}")
    tiktoken_s, prepare_s = statistics.median(alone), statistics.median(whole)
    print(f"{megabytes:.1f} MB, {len(documents)} documents, {n_alone} tokens, {options.threads} threads")
    for name, seconds in (("tiktoken", tiktoken_s), ("prepare", prepare_s)):
        print(f"{name:9} median {seconds:.3f} s  {megabytes / seconds:.1f} MB/s  {n_alone / seconds:,.0f} tokens/s")
    print(f"prepare is {tiktoken_s / prepare_s:.0%} of tiktoken's speed (aim: at least 80 %)")


if __name__ == "__main__":
    main()
