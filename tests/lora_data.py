"""What the tests of adapters and preference optimisation train on."""

import json
from pathlib import Path

from tests.training import run_tiny

PAIRS = [{"prompt": f"{a}+{b}", "chosen": str(a + b), "rejected": str(a * b + 11)}
         for a in range(2, 8) for b in range(3, 6)]


def base_run(data: Path, out: Path) -> Path:
    """A pretrained tiny model to fine-tune: its checkpoint."""
    run_tiny(data, out, "--train.steps=6", "--eval.every=0")
    return out / "checkpoints" / "step-00000006"


def pairs_file(path: Path) -> Path:
    path.write_text("\n".join(json.dumps(pair) for pair in PAIRS) + "\n")
    return path
