"""This project's ops beside PyTorch's own, on whatever device is there, and how much of what it can do they reach.

    python -m benchmarks.kernels [--op attention bias_gelu] [--dtype float32] [--json FILE] [--png FILE]

Each row: one pass of an op; this project's and every peer in alternation, medians. The limit of a pass is the longer of
two times: its FLOPs at the speed of a large matrix product, and its bytes (those that it must move, csrc/README.md)
at the speed of a copy, both measured in the same run. The share may pass 100% where data stay in a cache. The error
is the largest difference from float64 over the largest value, at a small shape. A CPU that does not multiply bf16 is
timed in fp32 alone, if --dtype does not say otherwise: its products in bf16 take a hundred times as long.
"""

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import ops_timed
from benchmarks.ops_timed import FAMILIES, OURS, Family, Timed, short
from benchmarks.timing import Time, alternating, copy_bandwidth, matmul_flops
from gptdist.ops import backends
from gptdist.parallel.host import has_bf16, set_up_process


@dataclass(frozen=True)
class Limits:
    """What the device reached in this run: bytes per second of a copy, FLOP/s of a matrix product by dtype."""

    copy: float
    matmul: dict[str, float]

    def ms(self, timed: Timed) -> float:
        return 1e3 * max(timed.bytes / self.copy, timed.flops / self.matmul[timed.dtype])


@dataclass(frozen=True)
class Row:
    """One pass of an op as timed. times: of this project and its peers by name; error: see the head of this file."""

    op: str
    direction: str
    dtype: str
    shape: str
    backend: str
    bytes: int
    flops: int
    limit_ms: float
    times: dict[str, Time]
    error: float | None = None

    @property
    def ms(self) -> float | None:
        return self.times[OURS].ms

    @property
    def best_peer(self) -> tuple[str, float] | None:
        """Name and milliseconds of the fastest peer that ran."""
        peers = {name: time.ms for name, time in self.times.items() if name != OURS and time.ms is not None}
        return min(peers.items(), key=lambda item: item[1], default=None)


def measured_limits(device: torch.device, dtypes, repeats: int, copy_bytes: int, matmul_size: int) -> Limits:
    matmul = {short(dtype): matmul_flops(device, dtype, matmul_size, repeats) for dtype in dtypes}
    return Limits(copy_bandwidth(device, copy_bytes, repeats), matmul)


def rows(
    device: torch.device,
    limits: Limits,
    *,
    families: dict[str, Family],
    repeats: int,
    limit_s: float,
    peers: set[str] | None = None,
    with_errors: bool = True,
) -> Iterator[Row]:
    """Every pass of some ops. peers: those to time beside them, None: all. repeats, limit_s: of each pass."""
    for name, family in families.items():
        for dtype in family.dtypes(device):
            backend = backends.choose(name, device, dtype).backend
            errors = ops_timed.errors(family.make(device, dtype, *family.small)) if with_errors else {}
            for shape in family.shapes(device):
                for timed in ops_timed.passes(name, family.make(device, dtype, *shape), dtype, peers=peers):
                    times = alternating(timed.functions, device, repeats=repeats, limit_s=limit_s)
                    what = timed.op, timed.direction, timed.dtype, timed.shape
                    error = errors.get(timed.direction)
                    yield Row(*what, backend, timed.bytes, timed.flops, limits.ms(timed), times, error)


# the report


def peer_cell(row: Row, name: str) -> str:
    time = row.times.get(name)
    return "" if time is None else "-" if time.ms is None else f"{time.ms:.3f}"


def markdown(found: list[Row]) -> str:
    """A table for each op (their peers differ), then why peers did not run."""
    lines = []
    for op in dict.fromkeys(row.op for row in found):
        group = [row for row in found if row.op == op]
        peers = list(dict.fromkeys(name for row in group for name in row.times if name != OURS))
        lines += [f"### {op}: {OURS}, backend {' or '.join(dict.fromkeys(row.backend for row in group))}", ""]
        head = ["pass", "dtype", "shape", "ms", *(f"{peer} ms" for peer in peers)]
        head += ["best peer / ms", "TFLOP/s", "GB/s", "share of the limit", "error"]
        lines += [table_row(head), table_row(["---"] * len(head))]
        lines += [table_row(row_cells(row, peers)) for row in group]
        lines.append("")
    for row in found:
        where = f"{row.op} {row.direction} {row.dtype} {row.shape}"
        lines += [f"- {where}, {name}: {time.refusal}" for name, time in row.times.items() if time.refusal]
    return "\n".join(lines).rstrip() + "\n"


def row_cells(row: Row, peers: list[str]) -> list[str]:
    cells = [row.direction, row.dtype, row.shape, peer_cell(row, OURS), *(peer_cell(row, peer) for peer in peers)]
    error = "" if row.error is None else f"{row.error:.1e}"
    if row.ms is None:
        return [*cells, "-", "-", "-", "-", error]
    best = f"{row.best_peer[1] / row.ms:.2f} ({row.best_peer[0]})" if row.best_peer else "-"
    tflops = f"{row.flops / row.ms / 1e9:.3g}" if row.flops else ""
    gbytes = f"{row.bytes / row.ms / 1e6:.1f}"
    return [*cells, best, tflops, gbytes, f"{row.limit_ms / row.ms:.0%}", error]


def table_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def head(device: torch.device, limits: Limits, repeats: int) -> list[str]:
    peaks = ", ".join(f"{dtype} {flops / 1e12:.3g}" for dtype, flops in limits.matmul.items())
    return [
        f"date      {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"command   python -m benchmarks.kernels {shlex.join(sys.argv[1:])}".rstrip(),
        f"hardware  {hardware(device)}, {platform.system()} {platform.machine()}",
        f"software  torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        f"limits    copy {limits.copy / 1e9:.0f} GB/s read and written; matrix product, TFLOP/s: {peaks}",
        f"method    medians of at most {repeats} alternating rounds",
    ]


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from gptdist import doctor

    return f"{doctor.collect()['cpu']['model']}, {torch.get_num_threads()} threads"


def plot(found: list[Row], path: Path) -> None:
    """Times faster (or slower) than the best peer, a bar for each row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in found if row.ms is not None and row.best_peer]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.28 * max(1, len(shown))))
    names = [f"{row.op} {row.direction} {row.dtype} {row.shape}" for row in shown]
    axes.barh(names, [row.best_peer[1] / row.ms for row in shown])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("time of the best peer / time")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def of_dtypes(names: list[str], dtypes: list[torch.dtype]) -> dict[str, Family]:
    """The families of that name, in those of their dtypes alone."""
    def kept(own: tuple[torch.dtype, ...]) -> tuple[torch.dtype, ...]:
        return tuple(dtype for dtype in own if dtype in dtypes)

    return {name: replace(family, cpu_dtypes=kept(family.cpu_dtypes), cuda_dtypes=kept(family.cuda_dtypes))
            for name, family in ((name, FAMILIES[name]) for name in names)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="OP")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"],
                        help="default: what the device multiplies, see the head of this file")
    parser.add_argument("--no-compile", action="store_true", help="leave out the peers that torch.compile makes")
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    native = [torch.float32, torch.bfloat16] if has_bf16(device) else [torch.float32]
    set_up_process(device)  # as in training, and for every peer: freed memory is kept
    families = of_dtypes(args.op, [getattr(torch, name) for name in args.dtype] if args.dtype else native)
    dtypes = dict.fromkeys(dtype for family in families.values() for dtype in family.dtypes(device))
    sizes = (1 << 29, 8192) if device.type == "cuda" else (1 << 26, 1024)
    limits = measured_limits(device, dtypes, 11, *sizes)
    peers = ops_timed.PEERS - {"compiled"} if args.no_compile else None
    torch.manual_seed(0)
    title = head(device, limits, args.repeats)
    print("\n".join(title) + "\n")
    found = []
    for row in rows(device, limits, families=families, repeats=args.repeats, limit_s=3.0, peers=peers):
        found.append(row)
        print(f"{row.op} {row.direction} {row.dtype} {row.shape}: {peer_cell(row, OURS)} ms", file=sys.stderr)
    print(markdown(found))
    if args.json:
        data = {"head": title, "limits": asdict(limits), "rows": [asdict(row) for row in found]}
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    if args.png:
        plot(found, args.png)


if __name__ == "__main__":
    main()
