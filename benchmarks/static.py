"""The CUDA kernels without a GPU: registers, spills, shared memory, occupancy, attention's loops, traffic.

    python -m benchmarks.static [--arch sm_80 sm_90] [--json FILE] > benchmarks/results/static.md

The PTX is that of gptdist/_C_cuda.so, assembled by ptxas for each GPU and taken apart by nvdisasm; block sizes and
shared memory are those of the launches, and traffic is counted, on the PTX machine (tests/cuda_vm.py). How to read the
tables: csrc/README.md. FlashAttention-2's figures: compiled with nvcc 13.0 side by side, bf16, causal, even lengths.
"""

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import attention_checks, checks, ptx, sass, traffic
from benchmarks.occupancy import MULTIPROCESSORS, blocks_per_multiprocessor
from gptdist.errors import MissingError
from gptdist.ops import backends

PLAIN_ATTENTION = re.compile(r"attention_(forward|dkv|dq)_kernelI13__nv_bfloat16Li(64|128)ELi0E")
IN_LOOP = ("HMMA", "MUFU", "LDSM", "LDGSTS", "STL", "LDL")

# FlashAttention-2 (Dao 2023): instructions per HMMA of its steady loop on sm_80; bytes spilled (stores + loads) by GPU.
# Its backward is one kernel, this project's two (dkv and dq).
FLASH_ATTENTION_2 = {
    ("forward", 64): (4.41, {"sm_80": 576, "sm_90": 528}),
    ("forward", 128): (3.45, {"sm_80": 468, "sm_90": 412}),
    ("backward", 64): (4.01, {"sm_80": 200, "sm_90": 104}),
    ("backward", 128): (3.05, {"sm_80": 152, "sm_90": 24}),
}


@dataclass(frozen=True)
class Kernel:
    """One instantiation on one GPU. dynamic_shared: bytes, None where no launch of it was seen."""

    name: str
    arch: str
    used: ptx.Used
    threads: int
    dynamic_shared: int | None
    blocks: int
    loop: sass.Loop | None

    @property
    def attention(self) -> tuple[str, int, int] | None:
        """(pass, D, variant: 0 plain, 1 documents, 2 dropout) of an attention kernel with a loop."""
        match = re.fullmatch(r"attention_(forward|dkv|dq)<bf16, (\d+), (\d)>", self.name)
        return (match[1], int(match[2]), int(match[3])) if match else None


def launched_sizes(device) -> dict[str, tuple[int, int]]:
    """Mangled name -> (threads, bytes of dynamic shared memory) of its largest launch, over shapes of every variant."""
    shapes = checks.Shapes(rows=(1,), widths=(512, 768, 1024, 8192, 16384), vocabularies=(50257,), blocks=())
    cpu = torch.device("cpu")
    with device.run(races=False) as log:
        for dtype in checks.DTYPES:
            for case in checks.cases(cpu, dtype, shapes):
                checks.with_gradients(case.function, case.tensors)
            for width in (768, 63):
                key, ids = torch.ones(1, dtype=torch.int64), torch.arange(1)
                torch.ops.gptdist_vm.dropout(torch.randn(1, 1, width).to(dtype), 0.1, key, ids, 0, 0)
        for dtype in attention_checks.ULP:
            for D in (64, 128):
                for options in attention_checks.OPTIONS:
                    case = attention_checks.AttentionCase(1, 1, 1, 1, D, **options)
                    tensors = tuple(torch.randn(1, 1, 1, 1, D).to(dtype) for _ in range(3))
                    checks.with_gradients(attention_checks.packed(case, cpu), tensors)
    sizes: dict[str, tuple[int, int]] = {}
    for launch in log.launches:
        x, y, z = launch.block
        sizes[launch.name] = max(sizes.get(launch.name, (0, 0)), (x * y * z, launch.shared_bytes))
    return sizes


def kernels(texts: list[str], arch: str, sizes: dict[str, tuple[int, int]]) -> Iterator[Kernel]:
    """Every kernel of the PTX texts; fold_partials, which several have, once."""
    seen = set()
    for text in texts:
        used, machine_code = ptx.assemble(text, arch)
        functions = sass.functions(machine_code)
        for name, source in ptx.kernels(text).items():
            if name in seen:
                continue
            seen.add(name)
            threads, dynamic = sizes.get(name, (ptx.most_threads(source), None))
            shared = used[name].shared + (dynamic or 0)
            blocks = blocks_per_multiprocessor(arch, used[name].registers, threads, shared)
            loop = sass.steady_loop(functions[name])
            yield Kernel(ptx.readable(name), arch, used[name], threads, dynamic, blocks, loop)


# the report


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def attention_table(found: list[Kernel]) -> list[str]:
    """The kernels without options stand beside FlashAttention-2."""
    head = ["GPU", "kernel", "D", "options", "registers", "spilled, bytes", "blocks", "instructions per HMMA"]
    head += [f"{name} in loop" for name in IN_LOOP] + ["FA2: per HMMA", "FA2: spilled"]
    rows = []
    passes = ("forward", "dkv", "dq")
    shown = [(kernel, *kernel.attention) for kernel in found if kernel.attention]
    shown.sort(key=lambda row: (row[0].arch, row[3], passes.index(row[1]), row[2]))
    for kernel, direction, D, variant in shown:
        per_hmma, spills = FLASH_ATTENTION_2["forward" if direction == "forward" else "backward", D]
        theirs = [f"{per_hmma:.2f}" if kernel.arch == "sm_80" else "", f"{spills.get(kernel.arch, '')}"]
        cells = [kernel.arch, direction, str(D), ("none", "documents", "dropout")[variant], str(kernel.used.registers)]
        cells += [str(kernel.used.spills), str(kernel.blocks), f"{kernel.loop.per_hmma:.2f}"]
        cells += [str(kernel.loop.count(opcode)) for opcode in IN_LOOP]
        rows.append(cells + (theirs if variant == 0 else ["", ""]))
    return table(head, rows)


def traffic_table(found: list[traffic.Traffic]) -> list[str]:
    head = ["kernel", "shape", "read", "least", "written", "least", "sectors / least", "wavefronts / least"]
    rows = []
    for t in found:
        cells = [t.kernel, t.shape, *(f"{count:,}" for count in (t.read, t.least_read, t.written, t.least_written))]
        cells.append(f"{t.sectors / t.least_sectors:.3f}")
        cells.append(f"{t.wavefronts / t.least_wavefronts:.3f}" if t.least_wavefronts else "-")
        rows.append(cells)
    return table(head, rows)


def kernels_table(found: list[Kernel], archs: list[str]) -> list[str]:
    """A row for each instantiation; what differs between GPUs in the order of `archs`."""
    by_name: dict[str, list[Kernel]] = {}
    for kernel in found:
        by_name.setdefault(kernel.name, []).append(kernel)
    head = ["kernel", "threads", "shared: static", "dynamic"]
    head += [f"{what} {' / '.join(archs)}" for what in ("registers", "spilled", "blocks")]
    rows = []
    for name, group in sorted(by_name.items()):
        dynamic = "?" if group[0].dynamic_shared is None else str(group[0].dynamic_shared)
        cells = [name, str(group[0].threads), str(group[0].used.shared), dynamic]
        cells += [" / ".join(str(value) for value in values) for values in (
            [kernel.used.registers for kernel in group],
            [kernel.used.spills for kernel in group],
            [kernel.blocks for kernel in group],
        )]
        rows.append(cells)
    return table(head, rows)


def markdown(head: list[str], archs: list[str], found: list[Kernel], moved: list[traffic.Traffic]) -> str:
    return "\n".join([
        "# The CUDA kernels, without a GPU",
        "",
        *head,
        "",
        "csrc/README.md says how to read this.",
        "",
        "## Attention, bf16: the loop over tiles that need no mask",
        "",
        "FA2: FlashAttention-2 compiled with nvcc 13.0 side by side; its backward is one kernel, here two.",
        "",
        *attention_table(found),
        "## Traffic, bytes, counted on the PTX machine; bf16",
        "",
        *traffic_table(moved),
        f"## All {len({kernel.name for kernel in found})} kernels",
        "",
        *kernels_table(found, archs),
    ])


def versions() -> str:
    nvdisasm = subprocess.run([ptx.tool("nvdisasm"), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", nvdisasm)[1]
    system = f"{platform.system()} {platform.machine()}"
    return f"ptxas {ptx.ptxas_version()}, nvdisasm {release}, torch {torch.__version__}, {system}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=list(MULTIPROCESSORS), default=["sm_80", "sm_90"], metavar="ARCH")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from tests import cuda_vm

    problem = cuda_vm.missing() or ptx.tools_problem()
    if problem:
        raise MissingError(f"benchmarks.static: {problem}")
    device = cuda_vm.Device(cuda_vm.extracted_ptx(backends.CUDA_LIBRARY))
    moved, sizes = list(traffic.counted(device)), launched_sizes(device)
    found = [kernel for arch in args.arch for kernel in kernels(device.ptx, arch, sizes)]
    head = [
        f"date      {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"command   python -m benchmarks.static {shlex.join(sys.argv[1:])}".rstrip(),
        f"versions  {versions()}",
    ]
    print(markdown(head, args.arch, found, moved))
    if args.json:
        rows = [asdict(kernel) | {"loop": loop_counts(kernel.loop)} for kernel in found]
        data = {"head": head, "kernels": rows, "traffic": [asdict(row) for row in moved]}
        args.json.write_text(json.dumps(data, indent=1) + "\n")


def loop_counts(loop: sass.Loop | None) -> dict | None:
    if loop is None:
        return None
    return {"instructions": len(loop.opcodes), "per_hmma": loop.per_hmma} | {name: loop.count(name) for name in IN_LOOP}


if __name__ == "__main__":
    main()
