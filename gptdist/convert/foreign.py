"""What every reader of another format hands over."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptdist.checkpoint.shards import Part
from gptdist.config import ModelConfig
from gptdist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A model of another program: its shape and its tensors, unread and checked against each other.

    parts: by this project's parameter names. layout "plain": see convert/gpt2.py; "ours": as in this project's model.
    """

    config: ModelConfig
    parts: Mapping[str, Part]
    rows: int  # of the vocabulary, with whatever padding it has
    folders: tuple[Path, ...]  # where its tokenizer may lie, likeliest first
    layout: str = "plain"
    shape_source: str = "config.json"  # the file that says what the tensors should be
    note: str = ""  # what a user must know about the result


LARGEST_SIZE = 1 << 31  # of any dimension of a model


def named_config(path: Path, **values: Any) -> ModelConfig:
    """The configuration that a file gives; an impossible one is an error that names the file."""
    if large := [name for name, value in values.items() if isinstance(value, int) and value > LARGEST_SIZE]:
        raise UserError(f"{path}: {large[0]} is {str(values[large[0]])[:40]}, expected a size that a model can have")
    try:
        return ModelConfig(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_depth(config: ModelConfig, tensors: int, path: Path) -> None:
    """Raise UserError where a file says more blocks than there are tensors: before they are made."""
    if config.n_layers > tensors:
        raise UserError(f"{path} says {config.n_layers} blocks, but the model has {tensors} tensors: they belong to "
                        f"different models; use the files that the model was saved with")


def exact_ratio(hidden: int, width: int) -> float:
    """The mlp_ratio that gives exactly `hidden` units: int(ratio * width) must not round down."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)
