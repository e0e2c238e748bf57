"""Every command in the documents runs, in their order, except the set-up scripts, which CI runs itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# The set-up scripts, and what does not end by itself: tests/test_serve_command.py runs that.
NOT_HERE = ("bash launch/quickstart.sh", "bash launch/test.sh", "bash launch/assistant.sh", "gptdist serve", "source ")

# Fine-tuning for fewer steps than a reader's: what follows works with any model. The long test leaves these out.
SHORTER = {
    "configs/classify-debug.yaml": "--train.epochs=1",
    "configs/instruct-debug.yaml": "--train.steps=6",
    "configs/lora-debug.yaml": "--train.steps=6",
    "configs/dpo-debug.yaml": "--train.steps=6",
}


def commands(document: str) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", *NOT_HERE))]


def shortened(command: str) -> str:
    """With the further options that SHORTER has for its configuration."""
    return " ".join([command, *(options for config, options in SHORTER.items() if config in command)])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A directory like the project's, so that the commands write nothing into it."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "benchmarks", "gptdist", "launch"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run_all(todo: list[str], folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in todo:
        done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=600,
                              env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("document", ["README.md", "launch/README.md"])
def test_commands_run(document, checkout):
    todo = commands(document)
    assert todo, f"{document} has no commands"
    run_all([shortened(command) for command in todo], checkout)


@pytest.mark.long
def test_shortened_commands_run_as_they_stand(checkout):
    todo = [command for command in commands("README.md") if shortened(command) != command]
    assert len(todo) == len(SHORTER)
    run_all([f"{command} --run.dir=runs/whole-{i}" for i, command in enumerate(todo)], checkout)


@pytest.mark.parametrize("document", ["README.md", "launch/README.md", "csrc/README.md"])
def test_links_and_paths_exist(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert ((ROOT / document).parent / target).exists(), f"{document} links to {target}"


def test_configs_say_how_to_run_them():
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        head = "".join(path.read_text().splitlines(keepends=True)[:10])
        assert f"configs/{path.name}" in head, f"{path.name} does not show its command"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configs_are_valid(path):
    from gptdist import config
    from gptdist.data.prepare_config import check, load_config

    if path.name.startswith("corpus-"):  # for `gptdist prepare`
        check(load_config(str(path), {}))
    else:
        config.load(str(path))
