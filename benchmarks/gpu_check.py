"""The CUDA kernels on a GPU: are they right, and how fast beside PyTorch's own? gpu_check.sh builds them and runs this.

    python -m benchmarks.gpu_check --output benchmarks/results [--budget 520]

Correctness of every op (checks.py, attention_checks.py), times beside PyTorch (kernels.py), training steps of GPT-2
(training_speed.py), compute-sanitizer where it is there. Needs torch and nothing else. Each section runs in a process
of its own, so that one that crashes leaves the others a GPU that works, and is ended when its time is over: what it
had found by then counts. The report is written anew after every section.

Writes gpu_check.md and gpu_check.json. Exit code 1 if a check fails, or a section of checks did not come to its end; 3
without a GPU. `--device cpu` goes through all sections at tiny sizes; the checks that the kernels run fail there.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import gpu_report
from benchmarks.gpu_sections import HIDDEN, SECTIONS, setup
from gptdist.ops import backends

EXIT_FAILED, EXIT_NO_DEVICE = 1, 3
BUDGET_S = 520.0
LEAST_S = 15.0  # a section that would get less is left out


@dataclass
class Outcome:
    """One section: what it gave, how long it took, and in `note` why it did not come to its end."""

    name: str
    title: str
    results: list[tuple[str, dict]] = field(default_factory=list)
    seconds: float = 0.0
    note: str = ""

    def of(self, kind: str) -> list[dict]:
        return [fields for found, fields in self.results if found == kind]


def run_section(name: str, device: torch.device, results: Path | None) -> None:
    """A section in this process; each result becomes a line of JSON in the file."""
    setup(device)
    section = (SECTIONS | HIDDEN)[name]
    for kind, fields in section.run(device, device.type != "cuda"):
        if results is not None:
            with results.open("a") as file:
                file.write(json.dumps([kind, fields]) + "\n")


def command_of(name: str, device: torch.device, results: Path) -> list[str]:
    """The process of a section, under the sanitizer's tool where it has one. Raises FileNotFoundError without it."""
    tool, run = SECTIONS[name].tool, "smoke" if SECTIONS[name].tool else name
    prefix = [sanitizer(), "--tool", tool, "--kernel-regex", "kns=gptdist"] if tool else []
    arguments = ["--section", run, "--device", str(device), "--results", str(results)]
    return [*prefix, sys.executable, "-m", "benchmarks.gpu_check", *arguments]


def sanitizer() -> str:
    beside_nvcc = Path("/usr/local/cuda/bin/compute-sanitizer")
    found = shutil.which("compute-sanitizer") or (str(beside_nvcc) if beside_nvcc.exists() else None)
    if found is None:
        raise FileNotFoundError("compute-sanitizer is not here")
    return found


def in_child(command: list[str], limit_s: float) -> tuple[str, str]:
    """Run a process and what it starts for at most `limit_s`; what it said, and why it did not end well or ""."""
    with tempfile.TemporaryFile("w+") as said:  # a file: a pipe would wait for grandchildren that outlive a kill
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code, note = child.wait(limit_s), ""
        except subprocess.TimeoutExpired:
            code, note = 0, f"cut after {limit_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        said.seek(0)
        text = said.read()
    if code:
        note = f"ended with exit code {code}: {(text.strip().splitlines() or ['no output'])[-1][:300]}"
    return text, note


def run_one(name: str, device: torch.device, limit_s: float, command: Callable) -> Outcome:
    section, start = SECTIONS[name], time.monotonic()
    outcome = Outcome(name, section.title)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        try:
            said, outcome.note = in_child(command(name, device, results), limit_s)
        except FileNotFoundError as error:
            said, outcome.note = "", str(error)
        lines = results.read_text().split("\n")[:-1] if results.exists() else []  # a last line cut short is left out
    outcome.results = [tuple(json.loads(line)) for line in lines]
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY:.*", said)
    if section.tool and summary:
        outcome.results.append(("sanitizer", {"tool": section.tool, "summary": summary[-1]}))
    outcome.seconds = time.monotonic() - start
    return outcome


def run_all(
    device: torch.device, budget_s: float, save: Callable[[list[Outcome]], None], command=command_of
) -> list[Outcome]:
    """All sections, each within its limit and what is left of the budget; `save` is called after each."""
    outcomes, end = [], time.monotonic() + budget_s
    for name, section in SECTIONS.items():
        limit_s = min(section.limit_s, end - time.monotonic())
        if limit_s < LEAST_S:
            note = f"left out: the budget of {budget_s:.0f} s is used up"
            outcomes.append(Outcome(name, section.title, note=note))
        else:
            print(f"gpu_check: {section.title}, at most {limit_s:.0f} s", flush=True)
            outcomes.append(run_one(name, device, limit_s, command))
        save(outcomes)
    return outcomes


def failed(outcomes: list[Outcome]) -> bool:
    """Whether a check failed, or checks that should be there are not."""
    wrong = any(not check["ok"] for outcome in outcomes for check in outcome.of("check"))
    return wrong or any(outcome.note for outcome in outcomes if outcome.name in ("ops", "attention"))


def environment(device: torch.device) -> dict:
    gpu = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {"name": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        gpu["memory_gib"] = round(properties.total_memory / 2**30, 1)
    if not backends.cuda_library_problem():
        runtime, driver = backends.cuda_versions()
        gpu |= {"driver_cuda": backends.version(driver) if driver else "-", "library_cuda": backends.version(runtime)}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": f"python -m benchmarks.gpu_check {shlex.join(sys.argv[1:])}".strip(),
        "gpu": gpu,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "platform": f"{platform.system()} {platform.machine()}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for everything")
    parser.add_argument("--device", type=torch.device, help="cpu: go through everything at tiny sizes")
    parser.add_argument("--section", choices=[*SECTIONS, *HIDDEN], help="this section alone, in this process")
    parser.add_argument("--results", type=Path, help="with --section: the file that gets its results")
    args = parser.parse_args()
    if args.device is None or args.device.type == "cuda":
        problem = backends.cuda_device_problem()
        if problem:
            print(f"gpu_check: no GPU: {problem}", file=sys.stderr)
            return EXIT_NO_DEVICE
    device = args.device or torch.device("cuda")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if args.section:
        run_section(args.section, device, args.results)
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    found = environment(device)
    outcomes = run_all(device, args.budget, lambda outcomes: gpu_report.write(args.output, found, outcomes))
    print((args.output / "gpu_check.md").read_text())
    return EXIT_FAILED if failed(outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
