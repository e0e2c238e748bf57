"""Peak memory of training runs on the CPU beside what `gptdist plan` predicts, for every strategy.

    python -m benchmarks.plan [--cases single-fp32 ...] [--measured FILE] [--output benchmarks/results/plan.md]

Each case is a run of the Trainer for two steps, all but its checkpoint, with a state of 500 MB or more on each process.
Measured is the peak of the resident memory minus what the process had after its imports, of the rank that has most.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from benchmarks import plan_published
from benchmarks.tokenize import describe
from gptdist import config as config_module
from gptdist.config import Config
from gptdist.plan import make_plan
from gptdist.plan.devices import find_device

ROOT = Path(__file__).resolve().parent.parent
TABLES = "<!-- tables -->"
LIMIT = 0.10  # of what is measured, that a prediction may be off; some cases' runs differ by as much among themselves
COMMON = ["--model.n_heads=16", "--model.context=64", "--train.tokens_per_step=256", "--train.steps=2",
          "--train.precision=fp32", "--train.micro_batch=1", "--eval.tokens=64", "--eval.micro_batch=1",
          "--eval.every=0", "--checkpoint.every=0", "--run.tensorboard=false", "--parallel.threads=1"]


def model(width: int, layers: int, vocab: int, *more: str) -> list[str]:
    return [f"--model.width={width}", f"--model.n_layers={layers}", f"--model.vocab_size={vocab}", *more]


FULL = "--train.activation_checkpointing=full"
# A processor without bf16 instructions takes minutes for such a run: few tokens.
BF16 = ["--train.precision=bf16", "--model.context=16", "--train.tokens_per_step=64"]
OFFLOAD = "--parallel.offload_optimizer=true"
# Name -> (processes, overrides). The name begins with the strategy.
CASES = {
    "single-fp32": (1, model(1024, 2, 16384)),
    "single-bf16": (1, model(1280, 1, 16384, *BF16, FULL)),
    "ddp-fp32": (2, model(1024, 2, 16384)),
    "fsdp-fp32": (2, model(1408, 2, 16384)),
    "fsdp-bf16": (2, model(1280, 3, 8192, *BF16, FULL)),
    "fsdp-tensor": (2, model(1536, 2, 8192, "--parallel.tensor=2")),
    "hsdp-fp32": (2, model(1024, 2, 8192, "--parallel.replicas=2")),
    "zero1-fp32": (2, model(1024, 2, 16384)),
    "zero2-fp32": (2, model(1024, 3, 8192)),
    "zero3-fp32": (2, model(1280, 2, 16384)),
    "zero2-offload": (2, model(1280, 2, 8192, *BF16, OFFLOAD)),
    "zero3-offload": (2, model(1280, 2, 16384, OFFLOAD, "--parallel.offload_parameters=true")),
}
# Other shapes and micro-batches, at which nothing was looked for.
HELD_OUT = {
    "single-held-out": (1, model(768, 4, 32768, "--train.micro_batch=2")),
    "ddp-held-out": (2, model(768, 5, 16384)),
    "fsdp-held-out": (2, model(1024, 5, 16384, "--train.micro_batch=2")),
    "zero2-held-out": (2, model(1280, 2, 12288)),
    "zero3-held-out": (2, model(1024, 4, 16384)),
    "single-lora": (1, model(1536, 4, 16384, "--lora.rank=16")),
}
RUNS = CASES | HELD_OUT


def config_of(name: str, *more: str) -> Config:
    return config_module.load(None, [*COMMON, *RUNS[name][1], f"--parallel.strategy={name.split('-')[0]}", *more])


def predict(name: str) -> float:
    """Bytes of the run's largest process above its imports, as `gptdist plan` says."""
    return make_plan(config_of(name), RUNS[name][0], find_device("cpu", memory_gb=100)).memory.total


# The measurement: in each process of a run


def status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def train(name: str, data: Path, out: Path, baseline: int) -> None:
    """One process of the run `name`; leaves its peak above the baseline in out/RANK."""
    from gptdist.parallel.host import set_up_process
    from gptdist.parallel.world import init_world
    from gptdist.trainer import Trainer

    config = config_of(name, f"--data.path={data}", f"--run.dir={out / 'run'}")
    world = init_world(config.parallel)
    set_up_process(world.device)
    Trainer.save = lambda self, background=False: None
    Trainer(config, world).run()
    (out / str(world.rank)).write_text(str(status_bytes("VmHWM") - baseline))
    world.barrier()
    os._exit(0)


def measure(name: str, data: Path) -> int:
    """Peak bytes of the run's largest process above its imports.

    They are forked from a process that has imported everything and computed nothing: the imports are the baseline.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-m", "benchmarks.plan", "--worker", name, str(data), folder], cwd=ROOT,
                              capture_output=True, text=True, timeout=1800,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"})
        peaks = [int(path.read_text()) for path in Path(folder).glob("[0-9]")]
        if done.returncode or len(peaks) < RUNS[name][0]:
            raise RuntimeError(f"{name} failed: {done.stdout[-1000:]}{done.stderr[-4000:]}")
        return max(peaks)


def fork(name: str, data: Path, out: Path) -> None:
    """Import, then fork the run's processes and wait for them. Exits with 1 if one fails."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    if name.startswith("zero"):
        import deepspeed  # noqa: F401

    import gptdist.train_command  # noqa: F401  (with what it imports)

    baseline, world, children = status_bytes("VmRSS"), RUNS[name][0], []
    for rank in range(world):
        if (child := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                           "LOCAL_WORLD_SIZE": str(world)}
            try:
                train(name, data, out, baseline)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(int(any(statuses)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def dataset(folder: Path) -> Path:
    """A small prepared dataset of bytes."""
    from gptdist.data.corpus import embedded_documents
    from gptdist.data.prepare import PrepareConfig, prepare

    text = folder / "text.txt"
    documents = [document for _, document in zip(range(20), embedded_documents(), strict=False)]
    text.write_text("\n<|endoftext|>\n".join(documents)[:50_000], encoding="utf-8")
    prepare(PrepareConfig(inputs=[str(text)], output=str(folder / "bytes"), tokenizer="bytes",
                          document_separator="<|endoftext|>", val_fraction=0.1, workers=1))
    return folder / "bytes"


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        name, data, out = sys.argv[2:]
        fork(name, Path(data), Path(out))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(RUNS))
    parser.add_argument("--measured", type=Path, help="JSON file of peaks: read, and added to")
    parser.add_argument("--output", type=Path, help="Markdown file whose tables are written, its text kept")
    options = parser.parse_args()
    found = json.loads(options.measured.read_text()) if options.measured and options.measured.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        data = dataset(Path(folder))
        for name in options.cases:
            if name not in found:
                found[name] = measure(name, data)
                print(name, found[name] / 1e6, flush=True)
                if options.measured:
                    options.measured.write_text(json.dumps(found, indent=1))
    report = "\n".join(["## Peak memory of runs on the CPU", "", describe("benchmarks.plan"), "", *table(found), "",
                        "## Published runs", "", *plan_published.report()])
    print(report)
    if options.output:
        kept = options.output.read_text().partition(TABLES)[0] if options.output.exists() else "# Plans\n\n"
        options.output.write_text(f"{kept}{TABLES}\n\n{report}\n")


def table(measured: dict[str, int]) -> list[str]:
    """Of the cases that were measured."""
    lines = ["| run | processes | measured, MB | plan, MB | error |", "|---|---|---|---|---|"]
    for name in filter(measured.__contains__, RUNS):
        found, planned = measured[name], predict(name)
        lines.append(f"| {name} | {RUNS[name][0]} | {found / 1e6:,.0f} | {planned / 1e6:,.0f} | "
                     f"{planned / found - 1:+.1%} |")
    return lines


if __name__ == "__main__":
    main()
