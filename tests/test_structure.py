"""Imports point one way: cli -> trainer -> tasks -> ... -> config (gptdist's layers, highest first)."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "gptdist"

# A module may import from its own layer and from those below it.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"train_command", "launcher", "serve", "convert", "chat", "sweep"},
    {"trainer"},
    {"tasks", "evaluate", "generate"},
    {"checkpoint"},
    {"parallel"},
    {"optim", "model", "lora"},
    {"ops"},
    {"data", "metrics", "faults", "doctor", "doctor_distributed", "cluster", "plan", "profiling"},
    {"config"},
    {"errors", "files"},
]
# data, metrics, faults and doctor are leaves beside the ladder: they know only config, errors and, for doctor, what it
# reports of ops and of parallel/host.py. cluster and doctor_distributed look at the ranks, so they know parallel/ too.
EXTRA = {("doctor", "ops"), ("doctor", "parallel"), ("doctor_distributed", "parallel"), ("cluster", "parallel")}
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path) -> set[str]:
    """Top-level names inside gptdist that a file imports, anywhere in it."""
    package = ("gptdist", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names = [module] if module != "gptdist" else [f"gptdist.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("gptdist.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for other in imports(path) - {own, "__version__"}:
        allowed = DEPTH[other] >= DEPTH[own] or (own, other) in EXTRA
        assert allowed, f"{own} imports {other}, which is above it"


def test_the_model_knows_nothing_of_sharding():
    text = (PACKAGE / "model.py").read_text()
    assert "torch.distributed" not in text
    assert "DTensor" not in text
