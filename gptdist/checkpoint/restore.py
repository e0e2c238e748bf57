"""A trained model back from a checkpoint, in one process: for generation, evaluation and export."""

import os
from pathlib import Path

import torch
import yaml

from gptdist import config as config_module
from gptdist.checkpoint import layout, store
from gptdist.config import Config
from gptdist.data.tokenizer import Tokenizer
from gptdist.model import LanguageModel, build_meta


def read_config(checkpoint: str | os.PathLike) -> Config:
    """The resolved configuration saved in a checkpoint directory."""
    values = yaml.safe_load(layout.read_file(checkpoint, "config.yaml"))
    return config_module.from_dict(values, f"{checkpoint}/config.yaml")


def load_model(checkpoint: Path, *, device: str | torch.device = "cpu",
               dtype: torch.dtype = torch.float32, verify: bool = True) -> tuple[LanguageModel, Tokenizer, Config]:
    """(model in eval mode, tokenizer, configuration) of a checkpoint that any strategy saved at any world size.

    verify: check every sha256 first. Raises UserError for an incomplete or damaged checkpoint.
    """
    if verify:
        layout.verify(checkpoint)
    config = read_config(checkpoint)
    model = build_meta(config.model)
    model.to(dtype).to_empty(device=device)
    store.load(checkpoint, {f"model.{name}": p.detach() for name, p in model.named_parameters()})
    return model.eval(), Tokenizer.load(checkpoint / "tokenizer"), config
