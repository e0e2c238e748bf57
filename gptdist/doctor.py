"""gptdist doctor: what this machine offers, which implementation of each op runs on it, and why.

`collect()` gives everything as JSON-ready data; `run(json)` prints it, as tables or as JSON, and returns the exit code.
Nothing here fails because something is missing: what is missing is the answer.
"""

import json as jsonlib
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import torch

from .cluster import code_hash, package_version
from .errors import EXIT_DONE
from .ops import backends
from .parallel import host

CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16", "asimd", "bf16")
PACKAGES = ("deepspeed", "numpy", "tiktoken", "tokenizers", "safetensors", "transformers", "triton")
ISA_NAMES = ("portable", "avx2", "avx512", "avx512_bf16")


def _version_line(command: list[str]) -> str | None:
    """The first non-empty line a tool prints about its version; None if it is not there."""
    path = shutil.which(command[0])
    if path is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path}: does not run ({error})"
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    if result.returncode != 0 or not lines:
        return f"{path}: --version exits with {result.returncode}"
    return f"{lines[-1] if 'nvcc' in command[0] else lines[0]} ({path})"


def _cpu() -> dict:
    flags, model = [], platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = {}
        for line in info.read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
        model = fields.get("model name", model)
        present = set((fields.get("flags") or fields.get("Features") or "").split())
        flags = [flag for flag in CPU_FEATURES if flag in present]
    return {
        "model": model,
        "features": flags,
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_vectors": torch.backends.cpu.get_cpu_capability(),
    }


def _training() -> dict:
    """What a process that trains on this CPU sets (parallel/host.py)."""
    return {
        "physical_cores": host.physical_cores(),
        "bf16_products": host.has_bf16(torch.device("cpu")),
        "flushes_denormals": host.can_flush_denormals(),
        "keeps_freed_memory": host.can_keep_freed_memory(),
    }


def _devices() -> list[dict]:
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return devices


def _ops() -> list[dict]:
    """Per op and device type: the backend that runs, and the reason."""
    rows = []
    for op in backends.OPS:
        row = {"op": op}
        for device_type in ("cpu", "cuda"):
            choice = backends.choose(op, device_type)
            missing = backends.cuda_device_problem() if device_type == "cuda" else ""
            row[device_type] = {
                "backend": "none" if missing else choice.backend,
                "reason": missing or choice.reason,
            }
        rows.append(row)
    return rows


def _library() -> dict:
    problem = backends.library_problem()
    isa = None if problem else ISA_NAMES[torch.ops.gptdist_c.cpu_isa(-1)]
    return {"path": str(backends.LIBRARY) if not problem else None, "problem": problem or None, "cpu_kernels": isa}


def _cuda_library() -> dict:
    """The library of the CUDA kernels, and the CUDA versions of its runtime and of the driver (None: no driver)."""
    problem = backends.cuda_library_problem()
    versions = None if problem else backends.cuda_versions()
    return {
        "path": str(backends.CUDA_LIBRARY) if not problem else None,
        "problem": problem or None,
        "runtime": backends.version(versions[0]) if versions else None,
        "driver": backends.version(versions[1]) if versions and versions[1] else None,
    }


def _distributed() -> dict:
    available = torch.distributed.is_available()
    return {
        "gloo": available and torch.distributed.is_gloo_available(),
        "nccl": available and torch.distributed.is_nccl_available(),
    }


def collect() -> dict:
    """Everything doctor knows, as JSON-ready data."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    return {
        "gptdist": package_version("gptdist"),
        "code": code_hash(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "git": torch.version.git_version[:10],
        },
        "cpu": _cpu(),
        "cpu_training": _training(),
        "devices": _devices(),
        "tools": {
            "compiler": _version_line([*compiler, "--version"]),
            "nvcc": _version_line(["nvcc", "--version"]),
            "ninja": _version_line(["ninja", "--version"]),
        },
        "packages": {name: package_version(name) for name in PACKAGES},
        "distributed": _distributed(),
        "library": _library(),
        "cuda_library": _cuda_library(),
        "GPTDIST_OPS": os.environ.get("GPTDIST_OPS", ""),
        "ops": _ops(),
    }


def _summary(found: dict) -> list[tuple[str, str]]:
    """Rows of the first table."""
    cpu, library, cuda = found["cpu"], found["library"], found["cuda_library"]
    training = found["cpu_training"]
    devices = [f"{d['device']} {d['name']}, {d['memory_gib']} GiB, sm {d['capability']}" for d in found["devices"]]
    rows = [
        ("gptdist", f"{found['gptdist'] or 'not installed (running from its source)'}, code {found['code'][:12]}"),
        ("python", f"{found['python']} on {found['platform']}"),
        ("torch", f"{found['torch']['version']}, CUDA {found['torch']['cuda'] or 'not built in'}"),
        ("devices", "\n".join(devices) or f"cpu only: {backends.cuda_device_problem()}"),
        ("cpu", f"{cpu['model']}: {' '.join(cpu['features']) or 'features unknown'}"),
        ("threads", f"{cpu['torch_threads']} in torch, {cpu['usable_cores']} usable cores of {cpu['cores']}"),
        (
            "training on the cpu",
            f"{training['physical_cores']} physical cores, so many threads for one process, an Nth for each of N\n"
            f"denormals {'flushed' if training['flushes_denormals'] else 'not flushed: this processor cannot'}\n"
            f"freed memory {'kept' if training['keeps_freed_memory'] else 'not kept: the C library is not glibc'}\n"
            f"bf16 products {'in hardware' if training['bf16_products'] else 'not in hardware'}",
        ),
        *((name, value or "not found") for name, value in found["tools"].items()),
        ("communication", ", ".join(name for name, there in found["distributed"].items() if there) or "none"),
        *((name, value or "not installed") for name, value in found["packages"].items() if name == "deepspeed"),
        ("C++ library", library["problem"] or f"{library['path']}, {library['cpu_kernels']} kernels"),
        ("CUDA library", cuda["problem"] or f"{cuda['path']}, CUDA {cuda['runtime']}"),
        ("CUDA driver", cuda["driver"] or "not found"),
    ]
    return rows


def _print_tables(found: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    summary = Table(show_header=False, title="gptdist doctor")
    for name, value in _summary(found):
        summary.add_row(name, value)
    console.print(summary)
    shown = ("cpu",) if backends.cuda_device_problem() else ("cpu", "cuda")
    ops = Table("op", *(name for device in shown for name in (f"on {device}", "why")), title="ops")
    for row in found["ops"]:
        ops.add_row(row["op"], *(row[device][field] for device in shown for field in ("backend", "reason")))
    console.print(ops)


def run(json: bool = False) -> int:
    """Print what `collect` finds, as tables or as one JSON object; returns the exit code."""
    found = collect()
    if json:
        print(jsonlib.dumps(found, indent=2))
    else:
        _print_tables(found)
    return EXIT_DONE
