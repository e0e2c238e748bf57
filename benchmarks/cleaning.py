"""How fast filters of `prepare` are beside tiktoken, and that near-duplicate removal is linear in the input.

    python -m benchmarks.cleaning [--megabytes 4] [--sizes 10 100] [--tokenizer bpe:8192]

Filters: each alone over the embedded corpus, in batches as `prepare` makes them, in one thread; MB of UTF-8 per second
of that thread's processor time, which other programs on the machine change little. Near-duplicates: generated documents
of 50 to 1000 words of a vocabulary of 20,000, every fifth of them a copy of an earlier one with one word in fifty
changed. They are made as they are needed, so `--sizes 10 100 1000` needs minutes, but little memory and disk.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.tokenize import describe, varied_documents
from gptdist.data.clean import Duplicates, Each, SeenDigests, normalize_nfc, remove_control
from gptdist.data.near_duplicates import NearDuplicates
from gptdist.data.quality import QualityRules, parse_rules
from gptdist.data.scrub import Scrub
from gptdist.data.tokenizer import build_tokenizer
from gptdist.errors import MissingError

_BATCH_CHARS = 1 << 18


def batches(documents) -> Iterator[list[str]]:
    texts, size = [], 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= _BATCH_CHARS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def generated(megabytes: float, seed: int = 0) -> Iterator[str]:
    """Documents of about so many megabytes, a fifth of them near-duplicates of one of the last 1000 originals."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20_000)]
    recent: list[list[str]] = []
    size = 0
    while size < megabytes * 1e6:
        if recent and rng.random() < 0.2:
            words = list(rng.choice(recent))
            for _ in range(len(words) // 50):
                words[rng.randrange(len(words))] = rng.choice(vocabulary)
        else:
            words = rng.choices(vocabulary, k=rng.randint(50, 1000))
            recent = [*recent[-999:], words]
        text = " ".join(words)
        size += len(text) + 1
        yield text


def time_filter(one, documents: list[str]) -> float:
    """Processor seconds."""
    started = time.process_time()
    for texts in batches(documents):
        one(texts)
    return time.process_time() - started


def time_near(megabytes: float, folder: Path) -> tuple[float, dict]:
    """(processor seconds of the filter alone, its report)."""
    near, seconds = NearDuplicates(folder, 0.8), 0.0
    for texts in batches(generated(megabytes)):
        started = time.process_time()
        near(texts)
        seconds += time.process_time() - started
    report = near.report()
    near.close()
    return seconds, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=4)
    parser.add_argument("--sizes", type=float, nargs="*", default=[10, 100], help="MB for near-duplicates")
    parser.add_argument("--tokenizer", default="bpe:8192")
    options = parser.parse_args()
    print(describe("benchmarks.cleaning"))
    documents = varied_documents(options.megabytes)
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    tokenizer = build_tokenizer(options.tokenizer, documents)
    print(f"{megabytes:.1f} MB, {len(documents)} documents; MB per processor second, best of 3")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        makers = {
            "tiktoken alone": lambda: lambda texts: [tokenizer.encode_array(text) for text in texts],
            "control": lambda: Each("control", remove_control),
            "nfc": lambda: Each("nfc", normalize_nfc),
            "rules gopher": lambda: QualityRules(parse_rules(["gopher"])),
            "rules c4 lines": lambda: QualityRules(parse_rules(["c4", "lines"])),
            "scrub": lambda: Scrub(["email", "phone", "ip"]),
            "duplicates": lambda: Duplicates(SeenDigests(folder)),
            "near-duplicates": lambda: NearDuplicates(Path(tempfile.mkdtemp(dir=folder)), 0.8),
        }
        try:
            from gptdist.data.language import LanguageFilter

            LanguageFilter(["en"], 0.5)
            makers["languages"] = lambda: LanguageFilter(["en"], 0.5)
        except MissingError as error:
            print(f"languages: not measured ({error})")
        for label, make in makers.items():
            print(f"{label:16} {megabytes / min(time_filter(make(), documents) for _ in range(3)):8.1f}", flush=True)
        for size in options.sizes:
            seconds, report = time_near(size, Path(tempfile.mkdtemp(dir=folder)))
            print(f"near-duplicates, {size:g} MB: {seconds:.1f} processor s, {size / seconds:.1f} MB/s, "
                  f"{report['hits']} hits, {report['kept']} kept, "
                  f"table {report['table_bytes'] / report['kept']:.0f} bytes a kept text", flush=True)


if __name__ == "__main__":
    main()
