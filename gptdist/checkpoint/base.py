"""The base of a checkpoint that holds adapters alone (lora.save=adapters): another checkpoint, named in `base.json`.

    {"path": "/runs/base/checkpoints/step-00001000", "manifest_sha256": "..."}

The sha256 is that of the base's MANIFEST.json, which has the sha256 of every file there: adapters are never joined to
other weights than those they were trained on. A base may be a checkpoint of adapters too.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gptdist.checkpoint import layout, store
from gptdist.checkpoint.files import damaged
from gptdist.config import Config
from gptdist.errors import UserError

BASE_NAME = "base.json"


def describe_base(base: Path) -> bytes:
    """The content of base.json for adapters of this checkpoint."""
    return (json.dumps({"path": str(base.resolve()), "manifest_sha256": _identity(base)}) + "\n").encode()


def base_of(checkpoint: Path) -> Path | None:
    """The checkpoint that has the rest of this one's weights; None where it has all of them.

    Raises UserError where the base is missing, or has become another one.
    """
    if BASE_NAME not in layout.complete(checkpoint).files:
        return None
    match layout.read_table(checkpoint, BASE_NAME):
        case {"path": str(path), "manifest_sha256": str(wanted)}:
            _check(checkpoint, Path(path), wanted)
            return Path(path)
    raise damaged(checkpoint / BASE_NAME, "it has no path and manifest_sha256")


def _check(checkpoint: Path, base: Path, wanted: str) -> None:
    if not base.is_dir():
        raise UserError(f"{checkpoint} holds adapters alone, and their base {base} is not there: put it back, or a "
                        f"link to where it is now")
    if (found := _identity(base)) != wanted:
        raise UserError(f"{checkpoint} holds adapters for another base: the MANIFEST.json of {base} has the sha256 "
                        f"{found[:12]}, that of the base they were trained on {wanted[:12]}: put that one back")


def _identity(checkpoint: Path) -> str:
    layout.complete(checkpoint)
    return hashlib.sha256((checkpoint / layout.MANIFEST_NAME).read_bytes()).hexdigest()


def weight_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """key -> shape of all `model.*` that a checkpoint and its base have."""
    base = base_of(checkpoint)
    shapes = weight_shapes(base) if base else {}
    return shapes | {key: shape for key, (shape, _) in store.read_index(checkpoint).items() if key.startswith("model.")}


@dataclass(frozen=True)
class Base:
    """What the checkpoints of a run with lora.save=adapters leave to their base."""

    reference: bytes  # content of base.json
    shapes: dict[str, tuple[int, ...]]  # its weight_shapes


def find_base(config: Config, source: tuple[str, Path] | None) -> Base | None:
    """The base that a run's checkpoints refer to; None where they hold everything.

    source: ("resume" or "init", checkpoint) that the run started from. A resumed run keeps its base.
    """
    if config.lora.rank == 0 or config.lora.save == "all":
        return None
    kind, path = source or ("init", None)
    base = base_of(path) if kind == "resume" else path
    if base is None:
        why = f"{path} was saved with lora.save=all" if kind == "resume" else "the run starts from random weights"
        raise UserError(f"lora.save=adapters, but {why}, so there is no base to refer to: use lora.save=all")
    return Base(describe_base(base), weight_shapes(base))


def not_in_base(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Of a run's state, what its checkpoint has to hold: all that is trained, and what the base has in no such shape.

    shapes: the weight_shapes of the base.
    """
    trained = {key.removeprefix("optim.").rpartition(".")[0] for key in state if key.startswith("optim.")}

    def is_held(key: str, tensor: Tensor) -> bool:
        name = key.removeprefix("model.")
        return name == key or name in trained or shapes.get(key) != tuple(tensor.shape)

    return {key: tensor for key, tensor in state.items() if is_held(key, tensor)}
