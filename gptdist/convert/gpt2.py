"""GPT-2's tensors in the plain layout of other programs, and in this project's.

Plain: q, k and v are three blocks of rows, the vocabulary is not padded; matrices are (out, in), as nn.Linear's. Here:
`qkv` is grouped per head as [q, k, v], the vocabulary is padded to a multiple (padding that comes in is dropped, the
padding made here is zero, and neither is ever seen: padded logits are -inf).
Names are this project's on both sides; `gpt2_name` gives the original ones.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gptdist.checkpoint.restore import MergedReader
from gptdist.checkpoint.shards import Part
from gptdist.config import ModelConfig
from gptdist.convert.files import finite, listed
from gptdist.errors import UserError
from gptdist.model import build_meta

BLOCK = {
    "ln_1": "ln_1", "ln_2": "ln_2", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "mlp.fc": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
}
_VOCABULARY = ("wte.weight", "head.weight")  # one row a token


def gpt2_name(name: str) -> str:
    """blocks.0.attn.qkv.bias -> transformer.h.0.attn.c_attn.bias, as nanoGPT and Hugging Face have it."""
    if name == "head.weight":
        return "lm_head.weight"
    if not name.startswith("blocks."):
        return f"transformer.{name}"
    _, layer, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    return f"transformer.h.{layer}.{BLOCK[module]}.{kind}"


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """name -> shape of every parameter of this project's model, vocabulary padded."""
    return {name: tuple(p.shape) for name, p in build_meta(config).named_parameters()}


def plain_shapes(config: ModelConfig, rows: int) -> dict[str, tuple[int, ...]]:
    """The same in the plain layout, with `rows` rows of vocabulary."""
    return {name: (rows, *shape[1:]) if name in _VOCABULARY else shape for name, shape in shapes(config).items()}


def check_plain(parts: Mapping[str, Part], wanted: Mapping[str, tuple[int, ...]], where: object, source: str) -> None:
    """Raise UserError unless `parts` are exactly the wanted tensors. source: where the wanted shapes come from."""
    if missing := [gpt2_name(name) for name in wanted.keys() - parts.keys()]:
        raise UserError(f"{where}: no tensor {listed(missing)}, which {source} asks for; "
                        f"use the files that the model was saved with")
    if extra := [part.key for name, part in parts.items() if name not in wanted]:
        raise UserError(f"{where}: {listed(extra)} is no part of the GPT-2 of {source}; "
                        f"use the files that the model was saved with")
    for name, shape in wanted.items():
        check_shape(parts[name], shape, where, source)


def check_shape(part: Part, shape: tuple[int, ...], where: object, source: str) -> None:
    if part.shape != shape:
        raise UserError(f"{where}: {part.key} has shape {part.shape}, {source} gives {shape}: they belong to different "
                        f"models; use the files that the model was saved with")
    if not part.dtype.is_floating_point:
        raise UserError(f"{where}: {part.key} is {part.dtype}, expected floating-point weights; "
                        f"quantised models cannot be imported")


def to_checkpoint(parts: Mapping[str, Part], config: ModelConfig) -> list[Part]:
    """Plain tensors -> a checkpoint's `model.*`, fp32, converted when they are written."""
    return [Part(f"model.{name}", torch.float32, shape, _importer(name, parts[name], shape, config))
            for name, shape in shapes(config).items()]


def _importer(name: str, part: Part, shape: tuple[int, ...], config: ModelConfig) -> Callable[[], Tensor]:
    def get() -> Tensor:
        value = part.get().to(torch.float32)
        if name in _VOCABULARY:
            return _padded(value[:config.vocab_size], shape[0])
        return group_qkv(value, config) if ".attn.qkv." in name else value.contiguous()
    return get


def _padded(value: Tensor, rows: int) -> Tensor:
    padded = torch.zeros(rows, *value.shape[1:], dtype=value.dtype)
    padded[:value.shape[0]] = value
    return padded


def group_qkv(value: Tensor, config: ModelConfig) -> Tensor:
    """Rows [all q, all k, all v] (3C, ...) -> per head [q, k, v] (H * 3 * D, ...)."""
    rest = value.shape[1:]
    return value.reshape(3, config.n_heads, config.head_dim, *rest).transpose(0, 1).reshape(value.shape)


def ungroup_qkv(value: Tensor, config: ModelConfig) -> Tensor:
    """Per head [q, k, v] (H * 3 * D, ...) -> rows [all q, all k, all v] (3C, ...)."""
    rest = value.shape[1:]
    return value.reshape(config.n_heads, 3, config.head_dim, *rest).transpose(0, 1).reshape(value.shape)


def refuse_inexpressible(config: ModelConfig, target: str) -> None:
    """Raise UserError naming the setting that GPT-2 has no form for."""
    refused = (
        (config.positions != "learned", f"model.positions={config.positions}: it has learned positions only"),
        (config.kv_heads != config.n_heads,
         f"model.n_kv_heads={config.kv_heads}: it has no grouped queries (model.n_heads={config.n_heads})"),
        (not config.bias, "model.bias=false: its linear layers and norms have biases"),
    )
    for fails, why in refused:
        if fails:
            raise UserError(f"{target} describes this model as GPT-2, which cannot express {why}; "
                            f"only models of the GPT-2 family can be exported")


def from_checkpoint(reader: MergedReader, config: ModelConfig, dtype: torch.dtype) -> list[Part]:
    """A checkpoint's `model.*` -> plain tensors of `dtype`, read when they are written.

    A qkv projection without bias gets one of zeros.
    """
    parts = []
    for name, shape in plain_shapes(config, config.vocab_size).items():
        parts.append(Part(name, dtype, shape, _exporter(reader, name, config, dtype)))
        if name.endswith("attn.qkv.weight") and not config.has_qkv_bias:
            bias = name.replace("weight", "bias")
            parts.append(Part(bias, dtype, shape[:1], lambda n=shape[0]: torch.zeros(n, dtype=dtype)))
    return parts


def _exporter(reader: MergedReader, name: str, config: ModelConfig, dtype: torch.dtype) -> Callable[[], Tensor]:
    def get() -> Tensor:
        key = f"model.{name}"
        value = cast(finite(reader.read(key), key, reader.path), dtype, name)
        if name in _VOCABULARY:
            return value[:config.vocab_size]
        return ungroup_qkv(value, config) if ".attn.qkv." in name else value
    return get


def cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Finite values in `dtype`. Raises UserError if one has no finite form there."""
    result = value.to(dtype)
    if dtype == torch.float16 and bool(torch.isinf(result).any()):
        raise UserError(f"{name} has values beyond 65504, the largest of fp16: export with --dtype bf16 or fp32")
    return result
