"""The adapters of a checkpoint as the directory that Hugging Face's `peft` loads onto the exported base.

The format: peft's LoraConfig and adapter_model.safetensors. Adapters are named after the layers of transformers' GPT-2,
whose Conv1D has (in, out) weights: `fan_in_fan_out`. The rows of c_attn are [all q, all k, all v] there, so those of
lora_B are permuted. Apart adapted q, k and v are one adapter of three times the rank, in which each row has zeros for
the others' columns (lora.HeadRows).
"""

from pathlib import Path

import torch

from gptdist import lora
from gptdist.checkpoint import store
from gptdist.checkpoint.files import write_file
from gptdist.checkpoint.restore import read_config
from gptdist.checkpoint.shards import Part, write_shard
from gptdist.checkpoint.stream import new_directory
from gptdist.config import Config
from gptdist.convert import gpt2
from gptdist.convert.files import memory_part, to_json
from gptdist.errors import UserError


def write_peft(checkpoint: Path, final: Path, dtype: torch.dtype) -> None:
    """Write adapter_config.json and adapter_model.safetensors. UserError where the checkpoint has no adapters."""
    config = read_config(checkpoint)
    layers = sorted(key.removeprefix("model.").removesuffix(".lora_A")
                    for key in store.read_index(checkpoint) if key.endswith(".lora_A"))
    if not layers:
        raise UserError(f"{checkpoint} has no adapters (lora.rank={config.lora.rank}): export it with --format hf")
    if foreign := [layer for layer in layers if not layer.startswith("blocks.")]:
        raise UserError(f"{checkpoint} has an adapter of {foreign[0]}, which transformers' GPT-2 has not: "
                        f"only adapters of the blocks can be exported")
    parts = [part for layer in layers for part in _layer_parts(checkpoint, layer, config, dtype)]
    with new_directory(final) as temporary:
        write_shard(temporary / "adapter_model.safetensors", parts, metadata={"format": "pt"})
        write_file(temporary / "adapter_config.json", [to_json(adapter_config(layers, config))])


def _layer_parts(checkpoint: Path, layer: str, config: Config, dtype: torch.dtype) -> list[Part]:
    keys = {side: f"model.{layer}.{side}" for side in ("lora_A", "lora_B")}
    values = store.load_tensors(checkpoint, keys.values())
    rows = values[keys["lora_B"]]
    if (heads := lora.head_rows(config.model, config.lora, layer)) is not None:
        rows = heads.spread(rows)
    if layer.endswith("attn.qkv"):
        rows = gpt2.ungroup_qkv(rows, config.model)
    found = {"lora_A": values[keys["lora_A"]], "lora_B": rows}
    return [memory_part(f"base_model.model.{_module(layer)}.{side}.weight", gpt2.cast(value, dtype, keys[side]))
            for side, value in found.items()]


def _module(layer: str) -> str:
    """blocks.0.attn.qkv -> transformer.h.0.attn.c_attn."""
    return gpt2.gpt2_name(f"{layer}.weight").removesuffix(".weight")


def adapter_config(layers: list[str], config: Config) -> dict:
    """peft's LoraConfig: layers adapted in every block by their common name, others by their whole one."""
    adapted, model = config.lora, config.model
    kinds = {kind: [layer for layer in layers if layer.split(".", 2)[2] == kind] for kind in gpt2.BLOCK}
    targets = []
    for kind, found in kinds.items():
        targets += [gpt2.BLOCK[kind]] if len(found) == model.n_layers else map(_module, found)
    # The scale stays alpha / rank.
    tripled = {gpt2.BLOCK["attn.qkv"]: 3} if adapted.split_qkv and kinds["attn.qkv"] else {}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "revision": None,
        "inference_mode": True, "r": adapted.rank, "lora_alpha": adapted.alpha, "lora_dropout": adapted.dropout,
        "target_modules": targets, "fan_in_fan_out": True, "bias": "none", "modules_to_save": None,
        "init_lora_weights": True, "use_rslora": False, "use_dora": False,
        "rank_pattern": {name: n * adapted.rank for name, n in tripled.items()},
        "alpha_pattern": {name: n * adapted.alpha for name, n in tripled.items()},
    }
