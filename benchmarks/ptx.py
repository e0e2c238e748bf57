"""The CUDA kernels' PTX as the library ships it, assembled by ptxas: registers, spills, shared memory, machine code."""

import importlib.metadata
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gptdist.errors import MissingError

ENTRY = re.compile(r"^(?:\.visible |\.weak )?\.entry (\w+)\(", re.MULTILINE)
MAX_THREADS = re.compile(r"\.maxntid (\d+), (\d+), (\d+)")
USED = re.compile(
    r"Compiling entry function '(\w+)' for.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
)
TYPES = {"f": "fp32", "13__nv_bfloat16": "bf16", "6__half": "fp16"}


@dataclass(frozen=True)
class Used:
    """What ptxas says of a kernel: registers a thread, bytes spilled to local memory, bytes of static shared memory."""

    registers: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


def tool(name: str) -> str | None:
    """The path of `cuobjdump` or `nvdisasm`: of a toolkit, or of the PyPI package nvidia-cuda-NAME. None: not here."""
    found = shutil.which(name)
    if found:
        return found
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == name), None)


def ptxas_version() -> str | None:
    """`13.0`, or None without ptxas."""
    if shutil.which("ptxas") is None:
        return None
    said = subprocess.run(["ptxas", "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


def tools_problem() -> str:
    """Why PTX cannot be assembled and disassembled here, or the empty string."""
    if ptxas_version() is None:
        return "no ptxas on PATH (it comes with nvcc)"
    if tool("nvdisasm") is None:
        return "no nvdisasm (pip install nvidia-cuda-nvdisasm)"
    return ""


def kernels(ptx: str) -> dict[str, str]:
    """The kernels of a PTX text: mangled name -> its text, to the last closing brace before the next one."""
    starts = list(ENTRY.finditer(ptx))
    ends = [match.start() for match in starts[1:]] + [len(ptx)]
    bodies = (ptx[match.start() : end] for match, end in zip(starts, ends, strict=True))
    return {match[1]: body[: body.rindex("\n}") + 2] for match, body in zip(starts, bodies, strict=True)}


def most_threads(kernel: str) -> int:
    """Threads that a block of this kernel may have at most: its .maxntid."""
    x, y, z = map(int, MAX_THREADS.search(kernel).groups())
    return x * y * z


def only(ptx: str, wanted: re.Pattern) -> str:
    """The PTX text without the kernels in whose names `wanted` is not found."""
    for name, text in kernels(ptx).items():
        if not wanted.search(name):
            ptx = ptx.replace(text, "", 1)
    return ptx


def assemble(ptx: str, arch: str) -> tuple[dict[str, Used], str]:
    """What ptxas -O3 uses for each kernel of a PTX text on `arch` (`sm_80`), and the SASS of all.

    Raises MissingError without the tools, RuntimeError with ptxas's words where it refuses.
    """
    problem = tools_problem()
    if problem:
        raise MissingError(problem)
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
        source.write_text(ptx)
        command = ["ptxas", "-v", "-O3", f"-arch={arch}", str(source), "-o", str(cubin)]
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        if said.returncode != 0:
            raise RuntimeError(f"'ptxas -arch={arch}' exits with {said.returncode}: {said.stderr.strip()[:500]}")
        sass = subprocess.run([tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    return used(said.stderr), sass


def used(said: str) -> dict[str, Used]:
    """The report of `ptxas -v` by kernel."""
    found = {}
    for part in said.split("Compiling entry function")[1:]:
        match = USED.search(" ".join(f"Compiling entry function{part}".split()))
        name, stores, loads, registers, shared = match.groups()
        found[name] = Used(int(registers), int(stores), int(loads), int(shared or 0))
    return found


def readable(mangled: str) -> str:
    """_ZN7gptdist4cuda14dropout_kernelI6__halfLi1EEEvNS0_7DropoutE -> dropout<fp16, 1>."""
    match = re.match(r"_ZN7gptdist4cuda(\d+)", mangled)
    if match is None:
        return mangled
    end = match.end() + int(match[1])
    name = mangled[match.end() : end].removesuffix("_kernel")
    if not mangled[end:].startswith("I"):
        return name
    arguments = []
    for word in re.finditer(r"13__nv_bfloat16|6__half|f|S2_|L[ib](\d+)E|E", mangled[end + 1 :]):
        if word[0] == "E":
            break
        first_class = next((a for a in arguments if a in ("bf16", "fp16")), "")  # what S2_ repeats
        arguments.append(word[1] or TYPES.get(word[0], first_class))
    return f"{name}<{', '.join(arguments)}>"
