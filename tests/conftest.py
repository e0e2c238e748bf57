import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LEVELS = {"portable": 0, "avx2": 1, "avx512": 2}  # instruction sets of the C++ kernels


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    torch.set_num_threads(1)


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


def torchrun(world: int, *args: str, timeout_s: int = 180) -> subprocess.CompletedProcess:
    """`torchrun --nproc-per-node WORLD ARGS` on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout_s,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
