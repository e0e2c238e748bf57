import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gptdist.parallel.host import use_onednn_for_fp32
from tests import cuda_vm, workers
from tests.ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent
# The modules that take longest begin first, so that no process of `pytest -n` is left alone with one at the end.
FIRST = ("test_readme", "test_parallel", "test_zero", "test_tensor_parallel", "test_lora", "test_chaos",
         "test_classify", "test_bad_steps", "test_cuda_mutants")
# In processes that tests start, threads wait for each other asleep: with as many modules at a time as processors,
# threads that spin took 27 s of processor time for a training of 12 s.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
LEVELS = {"portable": 0, "avx2": 1, "avx512": 2}  # instruction sets of the C++ kernels


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(FIRST)))  # stable


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _fp32_products_as_in_training():
    """By one library for all tests, so that runs in this process and in others are equal bit for bit."""
    use_onednn_for_fp32()


@pytest.fixture(autouse=True)
def _denormals():
    """A test that trains in this process leaves them flushed (parallel/host.py)."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def device() -> cuda_vm.Device:
    """The CUDA ops on CPU tensors; skips where something for that is missing."""
    return cuda_vm.device()


@pytest.fixture
def poisoned():
    """Fixed random numbers, and NaN in all memory that torch hands out."""
    torch.manual_seed(0)
    with cuda_vm.poisoned_outputs():
        yield


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A small prepared dataset of bytes: real English, about 100,000 tokens."""
    from gptdist.data.corpus import embedded_documents
    from gptdist.data.prepare import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    documents = [doc for _, doc in zip(range(40), embedded_documents(), strict=False)]
    text.write_text("\n<|endoftext|>\n".join(documents)[:120_000], encoding="utf-8")
    prepare(PrepareConfig(inputs=[str(text)], output=str(folder / "bytes"), tokenizer="bytes",
                          document_separator="<|endoftext|>", val_fraction=0.1, workers=1))
    return folder / "bytes"


@pytest.fixture(params=["reference", *LEVELS])
def backend(request, monkeypatch):
    """Run a test on the reference and on each instruction set of the C++ kernels that this processor has."""
    if request.param == "reference":
        monkeypatch.setenv("GPTDIST_OPS", "reference")
        yield request.param
        return
    monkeypatch.delenv("GPTDIST_OPS", raising=False)
    from gptdist.ops import backends

    if backends.library_problem():
        pytest.skip(backends.library_problem())
    best = torch.ops.gptdist_c.cpu_isa(-1)
    level = LEVELS[request.param]
    if torch.ops.gptdist_c.cpu_isa(level) != level:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    torch.ops.gptdist_c.cpu_isa(best)


def run_gptdist(*args: str, timeout_s: int = 120, stdin: str | None = None, **env: str) -> subprocess.CompletedProcess:
    """`python -m gptdist ARGS` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "gptdist", *args], capture_output=True, text=True, cwd=ROOT,
                          input=stdin, timeout=timeout_s, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def torchrun(world: int, *args: str, timeout_s: int = 180) -> subprocess.CompletedProcess:
    """`torchrun --nproc-per-node WORLD ARGS` on this machine."""
    return subprocess.run(torchrun_command(world, *args), capture_output=True, text=True, cwd=ROOT, timeout=timeout_s,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def torchrun_command(world: int, *args: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *args]


def start_ranks(*args: str, world: int = 2) -> list[subprocess.Popen]:
    """`python ARGS` as each rank of a world of its own, without a launcher; stderr is piped."""
    port = free_port()
    return [subprocess.Popen(
        [sys.executable, *args], cwd=ROOT, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                          "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
        for rank in range(world)]


class Workers:
    """Ranks that several test modules use."""

    def __init__(self, world: int, folder: Path):
        self._world, self._folder, self._starts, self._jobs = world, folder, 0, 0
        self._ranks: Ranks | None = None

    def run(self, module: str, *arguments: Path, timeout_s: int = 600) -> str:
        """`module`.main(*arguments) in every process; what that printed. A failure ends the processes."""
        if self._ranks is None or self._ranks.ended():
            self._start()
        begin = self._ranks.out.stat().st_size
        self._submit([module, *map(str, arguments)])
        done = [self._jobs_folder / f"{self._jobs - 1}.{rank}" for rank in range(self._world)]
        self._ranks.wait(timeout_s, until=lambda: all(path.exists() for path in done))
        return self._ranks.out.read_bytes()[begin:].decode()

    def stop(self) -> None:
        if self._ranks is not None and not self._ranks.ended():
            self._submit([])
            self._ranks.wait(60)

    def _start(self) -> None:
        self._starts, self._jobs = self._starts + 1, 0
        self._jobs_folder = self._folder / f"start-{self._starts}"
        self._ranks = Ranks(self._world, self._jobs_folder, workers.main, self._jobs_folder,
                            Path("/proc", str(os.getpid())))

    def _submit(self, job: list[str]) -> None:
        path = self._jobs_folder / f"{self._jobs}.json"
        path.with_suffix(".partial").write_text(json.dumps(job))
        path.with_suffix(".partial").rename(path)
        self._jobs += 1


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory) -> Iterator[Workers]:
    pytest.importorskip("deepspeed", reason="pip install --no-build-isolation deepspeed")
    workers = Workers(2, tmp_path_factory.mktemp("workers"))
    yield workers
    workers.stop()
