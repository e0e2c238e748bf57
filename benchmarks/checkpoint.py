"""Saving and loading a checkpoint, beside `dd` on the same file system.

    python -m benchmarks.checkpoint [--megabytes 1000] [--worlds 1 2 4] [--rounds 6] [--directory DIR]

One state of DTensors is divided over each number of ranks. A round is: `dd conv=fsync` of as many bytes, a save in the
foreground, one in the background (the time that training waits, and the time until it is published), in rotating
order; then `dd` reading its file, a load without and one with checking every sha256 first, none of the files being in
the page cache. MB/s and ratios to dd are medians; the aim is 70% of dd.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.tokenize import describe
from gptdist import checkpoint
from gptdist.checkpoint.saver import Saver

TENSORS = 24
TARGET = 0.7
COLUMNS = ("dd write", "save", "async wait", "async published", "dd read", "load", "verify+load")


def make_state(megabytes: int, world: int) -> dict[str, DTensor]:
    mesh = init_device_mesh("cpu", (world,))
    rows = megabytes * 1_000_000 // TENSORS // 4 // 1024 // world  # of one rank
    return {f"model.{i}": DTensor.from_local(torch.randn(rows, 1024), mesh, [Shard(0)]) for i in range(TENSORS)}


def timed(do: Callable[[], object]) -> float:
    """Seconds from the moment that all ranks are ready until all are done."""
    dist.barrier()
    started = time.perf_counter()
    do()
    dist.barrier()
    return time.perf_counter() - started


def forget(path: Path) -> None:
    """Drop a file, or a directory's files, from the page cache."""
    for file in [path] if path.is_file() else filter(Path.is_file, path.rglob("*")):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def on_main(do: Callable[[], object]) -> None:
    if dist.get_rank() == 0:
        do()
    dist.barrier()


def dd(*words: str) -> None:
    subprocess.run(["dd", "bs=16M", "status=none", *words], check=True)


def one_round(root: Path, state: dict[str, DTensor], saver: Saver, number: int, n_bytes: int) -> list[float]:
    """Seconds of each of COLUMNS."""
    reference, saved, published = root / "dd", root / f"step-{2 * number:08d}", root / f"step-{2 * number + 1:08d}"
    seconds = {}

    def in_background() -> None:
        seconds["async wait"] = timed(lambda: saver.save(2 * number + 1, state, {}, background=True))
        saver.wait()

    writes = [
        ("dd write", lambda: on_main(lambda: dd("if=/dev/zero", f"of={reference}", "conv=fsync", f"count={n_bytes}",
                                                "iflag=count_bytes"))),
        ("save", lambda: checkpoint.save(root, 2 * number, state)),
        ("async published", in_background),
    ]
    for i in range(len(writes)):  # each comes first, second and last in turn: a disk slows down while it is written to
        name, write = writes[(number + i) % len(writes)]
        on_main(os.sync)
        seconds[name] = timed(write)
    on_main(lambda: [forget(path) for path in (reference, saved, published)])
    seconds["dd read"] = timed(lambda: on_main(lambda: dd(f"if={reference}", "of=/dev/null")))
    seconds["load"] = timed(lambda: checkpoint.load(saved, state))
    seconds["verify+load"] = timed(lambda: (checkpoint.verify_together(published), checkpoint.load(published, state)))
    on_main(lambda: [shutil.rmtree(path) for path in (saved, published)])
    on_main(reference.unlink)
    return [seconds[name] for name in COLUMNS]


def work(root: Path, megabytes: int, rounds: int) -> None:
    """One rank's part."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    state = make_state(megabytes, dist.get_world_size())
    n_bytes = sum(tensor.nbytes for tensor in state.values())
    saver = Saver(root, keep_last=10, keep_best=False)
    one_round(root, state, saver, 0, n_bytes)  # connections; staging memory is touched for the first time
    found = [one_round(root, state, saver, 1 + i, n_bytes) for i in range(rounds)]
    if dist.get_rank() == 0:
        report(found, n_bytes)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def report(found: list[list[float]], n_bytes: int) -> None:
    columns = dict(zip(COLUMNS, zip(*found, strict=True), strict=True))
    print(f"{dist.get_world_size()} ranks, {n_bytes / 1e6:.0f} MB in all, {len(found)} rounds")
    for name, seconds in columns.items():
        reference = columns["dd write" if name in COLUMNS[:4] else "dd read"]
        ratio = statistics.median(a / b for a, b in zip(reference, seconds, strict=True))
        median = statistics.median(seconds)
        line = f"  {name:16} {median:7.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"
        if name != "async wait":
            below = "" if ratio >= TARGET else f"  below {TARGET:.0%}"
            line += f"  {n_bytes / 1e6 / median:7.0f} MB/s  {ratio:5.2f} of dd{below}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000, help="of the whole state (default: %(default)s)")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--directory", help="on the file system to measure (default: the temporary directory's)")
    options = parser.parse_args()
    if "RANK" in os.environ:
        work(Path(options.directory), options.megabytes, options.rounds)
    print(describe("benchmarks.checkpoint"))
    print(f"load average before: {' '.join(f'{x:.1f}' for x in os.getloadavg())} (trust no timing of a busy machine)")
    for world in options.worlds:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world),
                       "-m", "benchmarks.checkpoint", "--megabytes", str(options.megabytes),
                       "--rounds", str(options.rounds), "--directory", directory]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(f"load average after: {' '.join(f'{x:.1f}' for x in os.getloadavg())}")


if __name__ == "__main__":
    main()
