"""Low-rank adapters (LoRA): the base stays frozen, and chosen matrix products get a small trained product beside them.

    y = W x + (alpha / rank) B A drop(x)     A (rank, in): Kaiming uniform; B (out, rank): zeros, so y begins as W x

Parameters: the base keeps its names (`blocks.0.attn.qkv.weight`), beside them are `blocks.0.attn.qkv.lora_A`, `lora_B`.
A `qkv` whose queries, keys and values are adapted apart (lora.split_qkv) has the three A stacked, (3 rank, in), and
each row of `lora_B` (out, rank) belongs to one of them, by the layout of qkv's rows: as a packed adapter of rank 3 rank
with the same A and `HeadRows.spread(lora_B)`.

Initial values come by name, as all others (model.initial_values), and nothing here knows of sharding.
Source: Hu et al., "LoRA: Low-rank adaptation of large language models" (2021), section 4.
"""

import contextlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptdist import ops
from gptdist.config import LoRAConfig, ModelConfig
from gptdist.errors import UserError
from gptdist.model import GPT, Dropout, LanguageModel, Linear

# Dropout sites of the adapters: one for each linear layer of the model, adapted or not, above those of the model.
FIRST_SITE = 1 << 15


@dataclass(frozen=True)
class HeadRows:
    """The layout of qkv's rows: per key/value head `slots` - 2 queries, a key and a value, each of `head_dim` rows."""

    slots: int
    head_dim: int

    @classmethod
    def of(cls, model: ModelConfig) -> "HeadRows":
        return cls(model.n_heads // model.kv_heads + 2, model.head_dim)

    def spread(self, lora_B: Tensor) -> Tensor:
        """(rows, rank) -> (rows, 3 rank): each row in its block of columns (queries, keys, values), zeros elsewhere.

        `rows` may be those of any number of whole heads.
        """
        slot = torch.arange(len(lora_B), device=lora_B.device) // self.head_dim % self.slots  # (rows,)
        kind = (slot - (self.slots - 3)).clamp(min=0)  # 0 for all queries, 1, 2
        chosen = kind[:, None] == torch.arange(3, device=lora_B.device)  # (rows, 3)
        return (lora_B[:, None, :] * chosen[:, :, None]).flatten(1)  # (rows, 3, rank) -> (rows, 3 rank)


class LoRALinear(Linear):
    """A linear layer of the model with an adapter. Takes over `base`'s parameters; on the meta device."""

    def __init__(self, base: nn.Linear, config: LoRAConfig, *, site: int, heads: HeadRows | None = None):
        assert base.weight.is_meta, "adapters are added before a model has memory"
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.config, self.site, self.heads = config, site, heads
        self.enabled = True
        rank_of_A = config.rank if heads is None else 3 * config.rank
        self.lora_A = nn.Parameter(torch.empty(rank_of_A, base.in_features, device="meta"))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, config.rank, device="meta"))

    def product(self, x: Tensor, dropout: Dropout | None) -> Tensor:
        y = F.linear(x, self.factor(x))
        return y + self._adapter(x, dropout) if self.enabled else y

    def forward(self, x: Tensor, dropout: Dropout | None = None) -> Tensor:
        y = F.linear(x, self.factor(x), self.bias)
        return y + self._adapter(x, dropout) if self.enabled else y

    def _adapter(self, x: Tensor, dropout: Dropout | None) -> Tensor:
        if dropout is not None and self.config.dropout > 0:
            x = ops.dropout(x, self.config.dropout, key=dropout.key, sample_ids=dropout.sample_ids, site=self.site)
        rows = self.lora_B
        if self.heads is not None:
            rows = self.heads.spread(rows)
        return F.linear(F.linear(x, self.lora_A) * scale_of(self.config), rows)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.config.rank}"


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def targets_of(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the linear layers that the configuration adapts. Raises UserError where there is none to adapt.

    lora.targets is a regular expression of whole names or of their ends: `attn.qkv` means that of every block.
    """
    pattern = config.target_pattern
    found = [name for name in linear_layers(model) if pattern.fullmatch(name)]
    if not found:
        kinds = dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", name) for name in linear_layers(model))
        raise UserError(f"lora.targets={config.targets!r} matches no linear layer of the model: it has "
                        f"{', '.join(kinds)}")
    if "head" in found and isinstance(model, LanguageModel):
        raise UserError(f"lora.targets={config.targets!r} names the language model's head, whose product is a part of "
                        f"the loss and takes no adapter: leave `head` out of lora.targets")
    return found


def apply(model: GPT, config: LoRAConfig, *, also_train: Collection[str] = ()) -> None:
    """Freeze a model on the meta device and give it adapters. Raises UserError for targets that do not fit it.

    also_train: names of parameters that stay trainable because nothing has trained them yet, such as a new head's.
    """
    chosen = targets_of(model, config)
    for name, p in model.named_parameters():
        p.requires_grad_(name in also_train)
    for number, (name, linear) in enumerate(linear_layers(model).items()):
        if name not in chosen:
            continue
        linear.requires_grad_(False)
        heads = head_rows(model.config, config, name)
        _replace(model, name, LoRALinear(linear, config, site=FIRST_SITE + number, heads=heads))


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model is its frozen base inside the block."""
    layers = adapters(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def head_rows(model: ModelConfig, config: LoRAConfig, name: str) -> HeadRows | None:
    """The layout of the rows of the linear layer `name`, where its adapter depends on it."""
    if not (config.split_qkv and name.endswith("attn.qkv")):
        return None
    return HeadRows.of(model)


def factors(lora_A: Tensor, lora_B: Tensor, config: LoRAConfig, heads: HeadRows | None) -> tuple[Tensor, Tensor]:
    """(L, R) fp32 of an adapter's values: it adds L R (out, in) to the weight of its layer."""
    rows = lora_B.float() if heads is None else heads.spread(lora_B.float())
    return scale_of(config) * rows, lora_A.float()


def scale_of(config: LoRAConfig) -> float:
    return config.alpha / config.rank


def is_adapter(name: str) -> bool:
    """Whether a parameter (or a checkpoint's key) of this name is an adapter's."""
    return name.endswith((".lora_A", ".lora_B"))


@torch.no_grad()
def merge(model: GPT) -> None:
    """Add the adapters to the weights, in place, and remove them: the same function as a plain model."""
    for name, layer in adapters(model).items():
        plain = Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        left, right = factors(layer.lora_A, layer.lora_B, layer.config, layer.heads)
        plain.weight += left @ right
        _replace(model, name, plain.train(layer.training))
