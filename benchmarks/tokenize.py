"""How fast `prepare` is beside tiktoken alone, on the same text and threads.

    python -m benchmarks.tokenize [--megabytes 60] [--threads N] [--repeats 5] [--tokenizer gpt2|bpe:8192|PATH]

The text is the embedded corpus, repeated with a different first line each time so that the duplicate filter keeps
every copy. `tiktoken.encode_ordinary_batch` gets the documents as a list in memory; `prepare` reads them from a JSONL
file, cleans, hashes, tokenizes and writes shards. The two alternate; medians are compared. Processor seconds of all
threads are printed too: on a machine that others use they are the steadier measure.
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


def time_tiktoken(tokenizer: Tokenizer, documents: list[str], threads: int) -> tuple[float, float, int]:
    """Return (seconds, processor seconds, tokens) of tiktoken alone."""
    started, cpu_started = time.perf_counter(), time.process_time()
    encoded = tokenizer._encoding.encode_ordinary_batch(documents, num_threads=threads)
    return time.perf_counter() - started, time.process_time() - cpu_started, sum(map(len, encoded))


def time_prepare(source: Path, tokenizer_path: Path, threads: int, output: Path) -> tuple[float, float, int]:
    """Return (seconds, processor seconds, tokens without eot) of all of prepare, loading the tokenizer included."""
    config = PrepareConfig(
        inputs=[str(source)], output=str(output), tokenizer=str(tokenizer_path), workers=threads, overwrite=True
    )
    started, cpu_started = time.perf_counter(), time.process_time()
    report = prepare(config)
    return time.perf_counter() - started, time.process_time() - cpu_started, report["tokens"] - report["documents"]


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
            alone.append(time_tiktoken(tokenizer, documents, options.threads))
            output = Path(directory) / "dataset"
            whole.append(time_prepare(source, Path(directory) / "tokenizer", options.threads, output))
    n_tokens = {n for _, _, n in alone + whole}
    if len(n_tokens) != 1:
        raise AssertionError(f"prepare and tiktoken disagree on the number of tokens: {n_tokens}")
    print(f"{megabytes:.1f} MB, {len(documents)} documents, {n_tokens.pop()} tokens, {options.threads} threads")
    medians = {}
    for name, runs in (("tiktoken", alone), ("prepare", whole)):
        seconds, cpu_seconds, n = (statistics.median(column) for column in zip(*runs, strict=True))
        medians[name] = seconds, cpu_seconds
        rate = f"{megabytes / seconds:.1f} MB/s  {n / seconds:,.0f} tokens/s"
        print(f"{name:9} median {seconds:.3f} s, processor {cpu_seconds:.3f} s  {rate}")
    speed, cpu = (alone / whole for alone, whole in zip(medians["tiktoken"], medians["prepare"], strict=True))
    print(f"prepare has {speed:.0%} of tiktoken's speed (aim: at least 80 %), {cpu:.0%} by processor seconds")


if __name__ == "__main__":
    main()
