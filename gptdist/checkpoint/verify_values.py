"""Whether a checkpoint is what its configuration says, down to its values: `gptdist verify`.

`layout.verify` finds bytes that changed after they were written; this also finds what was wrong when it was written.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from gptdist.checkpoint import layout
from gptdist.checkpoint.base import base_of, weight_shapes
from gptdist.checkpoint.index import Entry
from gptdist.checkpoint.restore import check_depth, read_config
from gptdist.checkpoint.stream import TensorReader
from gptdist.config import ModelConfig
from gptdist.data.tokenizer import Tokenizer
from gptdist.errors import UserError
from gptdist.faults.bad_steps import is_finite
from gptdist.model import build
from gptdist.optim.adamw import MOMENTS

# What an optimizer keeps for one parameter: AdamW, and momentum-only optimizers.
SLOT_SETS = (frozenset({"step", *MOMENTS}), frozenset({"momentum_buffer"}), frozenset({"step", "momentum_buffer"}))


@dataclass(frozen=True)
class Verified:
    """A checkpoint in which everything is right."""

    checkpoint: Path
    step: int
    tensors: int
    parameters: int
    files: int
    bytes: int
    optimizer: bool

    def __str__(self) -> str:
        state = "with optimizer" if self.optimizer else "weights only"
        return (f"{self.checkpoint}: all right: step {self.step}, {self.parameters:,} parameters, {state}; checksums "
                f"of {self.files} files ({self.bytes / 1e6:.1f} MB); keys, shapes, dtypes and finite values of "
                f"{self.tensors} tensors")


def verify_values(checkpoint: Path) -> Verified:
    """Check every checksum, key, shape, dtype and value. Raises UserError naming the first bad file or tensor."""
    layout.verify(checkpoint)
    manifest = layout.complete(checkpoint)
    reader = TensorReader(checkpoint)
    config = read_config(checkpoint)
    _check_step(checkpoint, manifest.step)
    _check_tokenizer(checkpoint, config.model)
    check_depth(checkpoint, config)
    parameters = dict(build(config).named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    _check_model(checkpoint, reader.index, shapes)
    trained = {name: shapes[name] for name, p in parameters.items() if p.requires_grad}
    optimizer = _check_optimizer(checkpoint, reader.index, trained)
    for key in reader.index:
        _check_finite(reader, key)
    return Verified(checkpoint, manifest.step, len(reader.index), sum(map(math.prod, shapes.values())),
                    len(manifest.files), sum(record.size for record in manifest.files.values()), optimizer)


def _bad(checkpoint: Path, why: str) -> UserError:
    return UserError(f"bad checkpoint: {checkpoint}: {why}; use another checkpoint")


def _check_step(checkpoint: Path, step: int) -> None:
    found = layout.read_train_state(checkpoint).get("step")
    if found != step:
        raise _bad(checkpoint, f"{layout.TRAIN_STATE_NAME} says step {found}, {layout.MANIFEST_NAME} step {step}")


def _check_tokenizer(checkpoint: Path, model: ModelConfig) -> None:
    tokenizer = Tokenizer.load(checkpoint / "tokenizer")
    if tokenizer.vocab_size != model.vocab_size:
        raise _bad(checkpoint, f"its tokenizer has {tokenizer.vocab_size} ids, its model.vocab_size is "
                               f"{model.vocab_size}")


def _check_model(checkpoint: Path, index: dict[str, Entry], shapes: dict[str, tuple[int, ...]]) -> None:
    """The model's keys are those that its configuration's model has, each in its shape, in fp32."""
    wanted = {f"model.{name}": shape for name, shape in shapes.items()}
    if (base := base_of(checkpoint)) is not None:  # the rest is there
        elsewhere = weight_shapes(base)
        wanted = {key: shape for key, shape in wanted.items() if key in index or elsewhere.get(key) != shape}
    if missing := sorted(wanted.keys() - index.keys()):
        raise _bad(checkpoint, f"no tensor {missing[0]} ({len(missing)} missing), which the model of config.yaml has")
    if extra := sorted(key for key in index.keys() - wanted.keys() if not key.startswith("optim.")):
        raise _bad(checkpoint, f"{extra[0]} ({len(extra)} such) is no tensor of the model of config.yaml")
    for key, shape in wanted.items():
        _check_entry(checkpoint, key, index[key], shape)


def _check_entry(checkpoint: Path, key: str, entry: Entry, shape: tuple[int, ...]) -> None:
    where = f"{key} ({entry.chunks[0].file if entry.chunks else 'nowhere'})"
    if entry.shape != shape:
        raise _bad(checkpoint, f"{where} has shape {entry.shape}, config.yaml gives {shape}")
    if entry.dtype != torch.float32:
        raise _bad(checkpoint, f"{where} is {entry.dtype}, expected torch.float32")


def _check_optimizer(checkpoint: Path, index: dict[str, Entry], shapes: dict[str, tuple[int, ...]]) -> bool:
    """Every trained parameter has all slots of an optimizer, or none has any (False)."""
    slots: dict[str, set[str]] = {}
    for key in index:
        if key.startswith("optim."):
            name, _, slot = key.removeprefix("optim.").rpartition(".")
            slots.setdefault(name, set()).add(slot)
    if not slots:
        return False
    if extra := sorted(slots.keys() - shapes.keys()):
        raise _bad(checkpoint, f"optim.{extra[0]}.*: the model of config.yaml has no such parameter")
    for name, shape in shapes.items():
        found = slots.get(name, set())
        if found not in SLOT_SETS:
            raise _bad(checkpoint, f"optim.{name}: the optimizer's slots are {sorted(found) or 'missing'}, expected "
                                   f"{' or '.join(str(sorted(s)) for s in SLOT_SETS[:2])}")
        for slot in found:
            entry = index[f"optim.{name}.{slot}"]
            if slot != "step":
                _check_entry(checkpoint, f"optim.{name}.{slot}", entry, shape)
            elif entry.shape != ():
                raise _bad(checkpoint, f"optim.{name}.step has shape {entry.shape}, expected one number")
    return True


def _check_finite(reader: TensorReader, key: str) -> None:
    for file, offset, values in reader.boxes(key):
        if not is_finite(values):
            bad = (~torch.isfinite(values)).nonzero()
            first = tuple(o + i for o, i in zip(offset, bad[0].tolist(), strict=True))
            raise _bad(reader.path, f"{key} ({file}) has {len(bad)} values that are not finite, the first at "
                                    f"{list(first)}: {values[tuple(bad[0].tolist())].item()}")
