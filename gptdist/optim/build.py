"""The optimizer of a run."""

from torch import nn

from gptdist.config import Config
from gptdist.optim.adamw import AdamW, build_adamw
from gptdist.optim.muon import build_muon


def build_optimizer(parameters: list[tuple[str, nn.Parameter]], config: Config) -> AdamW:
    """AdamW or Muon (optim.name) for these parameters. config: with a precision that is decided."""
    return build_muon(parameters, config) if config.optim.name == "muon" else build_adamw(parameters, config.optim)
