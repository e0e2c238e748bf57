"""Hugging Face's GPT-2 weights and this project's names and layouts."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gptdist.config import ModelConfig

# Hugging Face's name of each part of a block -> ours. Its Conv1D weights are (in, out), ours (out, in).
_BLOCK = {
    "ln_1": "ln_1", "ln_2": "ln_2", "attn.c_attn": "attn.qkv", "attn.c_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc", "mlp.c_proj": "mlp.proj",
}


def gpt2_to_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """State dict of `GPT2LMHeadModel` -> state dict of `LanguageModel(config)`, new tensors.

    The vocabulary is padded with zero rows. Attention buffers are left out; a tied head too.
    """
    ours = {"wte.weight": _pad_rows(state["transformer.wte.weight"], config.padded_vocab),
            "wpe.weight": state["transformer.wpe.weight"].clone()}
    for kind in ("weight", "bias"):
        ours[f"ln_f.{kind}"] = state[f"transformer.ln_f.{kind}"].clone()
        for layer in range(config.n_layers):
            for theirs, name in _BLOCK.items():
                value = state[f"transformer.h.{layer}.{theirs}.{kind}"]
                value = value.t() if value.dim() == 2 else value  # (in, out) -> (out, in)
                value = group_qkv(value, config) if name == "attn.qkv" else value
                ours[f"blocks.{layer}.{name}.{kind}"] = value.contiguous().clone()
    if not config.tied:
        ours["head.weight"] = _pad_rows(state["lm_head.weight"], config.padded_vocab)
    return ours


def group_qkv(value: Tensor, config: ModelConfig) -> Tensor:
    """Rows [all q, all k, all v] (3C, ...) -> per head [q, k, v] (H * 3 * D, ...)."""
    grouped = value.view(3, config.n_heads, config.head_dim, *value.shape[1:]).transpose(0, 1)  # (H, 3, D, ...)
    return grouped.reshape(value.shape)


def _pad_rows(value: Tensor, rows: int) -> Tensor:
    padded = torch.zeros(rows, *value.shape[1:], dtype=value.dtype)
    padded[:value.shape[0]] = value
    return padded
