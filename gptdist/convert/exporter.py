"""`gptdist export`: a checkpoint -> Hugging Face's files, GGUF or peft's adapter, one tensor at a time.

Adapters are merged into the weights, except for peft's format, which has them alone.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gptdist.checkpoint import layout
from gptdist.checkpoint.files import write_file
from gptdist.checkpoint.restore import MergedReader, read_config, refuse_classifier
from gptdist.checkpoint.shards import Part, write_shard
from gptdist.checkpoint.store import refuse_existing
from gptdist.checkpoint.stream import groups, new_directory, part_bytes
from gptdist.config import ModelConfig
from gptdist.convert import gpt2
from gptdist.convert.files import to_json
from gptdist.convert.hf import conv1d
from gptdist.convert.tokenizer import hugging_face_files
from gptdist.data.tokenizer import Tokenizer
from gptdist.errors import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMATS = ("hf", "gguf", "peft")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Export:
    """A verified checkpoint of a GPT-2, ready to be written in another form."""

    checkpoint: Path
    config: ModelConfig
    tokenizer: Tokenizer
    reader: MergedReader
    dtype: torch.dtype

    def parts(self, dtype: torch.dtype) -> list[Part]:
        """The tensors in the plain layout, read when they are written."""
        return gpt2.from_checkpoint(self.reader, self.config, dtype)


def open_export(checkpoint: Path, target: str, dtype: str, *, merge: bool = True) -> Export:
    """Check the checkpoint and what the target can express, before anything is written.

    merge: adapters are part of the weights; without it they are left out.
    """
    layout.verify(checkpoint)
    config = read_config(checkpoint)
    refuse_classifier(checkpoint, config)
    config = config.model
    tokenizer = Tokenizer.load(checkpoint / "tokenizer")
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{checkpoint}: its tokenizer has {tokenizer.vocab_size} ids, its model {config.vocab_size}; "
                        f"use another checkpoint")
    gpt2.refuse_inexpressible(config, target)
    reader = MergedReader(checkpoint, merge=merge)
    for name, shape in gpt2.shapes(config).items():
        if (entry := reader.index.get(f"model.{name}")) is None or entry.shape != shape:
            raise UserError(f"{checkpoint}: model.{name} is {'missing' if entry is None else entry.shape}, config.yaml "
                            f"gives {shape}; use another checkpoint")
    return Export(checkpoint, config, tokenizer, reader, DTYPES[dtype])


def export_model(checkpoint: Path, output: str, *, format: str, dtype: str = "fp32", shard_size: str = "5GB",
                 merge: bool = True) -> Path:
    """Write `checkpoint` as `format`: a directory (hf, peft) or a file (gguf). Atomic; UserError if `output` exists.

    merge: whether adapters are part of the weights written.
    """
    final = Path(output)
    refuse_existing(final)
    limit = parse_size(shard_size)
    if format == "gguf":
        from gptdist.convert.gguf import write_gguf

        write_gguf(open_export(checkpoint, "GGUF", dtype, merge=merge), final)
    elif format == "hf":
        write_hf(open_export(checkpoint, "Hugging Face", dtype, merge=merge), final, limit)
    elif format == "peft":
        from gptdist.convert.peft import write_peft

        open_export(checkpoint, "peft", dtype)
        write_peft(checkpoint, final, DTYPES[dtype])
    else:
        raise UserError(f"unknown format {format!r}, expected {' or '.join(FORMATS)}")
    return final


def parse_size(text: str) -> int:
    """'5GB' -> 5000000000."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    size = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise UserError(f"shard size {text!r}: expected a size such as 500MB, 5GB or 2GiB")
    return size


def write_hf(export: Export, final: Path, shard_bytes: int) -> None:
    """The directory that AutoModelForCausalLM and AutoTokenizer load."""
    parts = [replace(conv1d(part.key, part), key=gpt2.gpt2_name(part.key)) for part in export.parts(export.dtype)]
    shards = groups(parts, shard_bytes)
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = _hf_files(export) | hugging_face_files(export.tokenizer, export.config.context)
    if len(shards) > 1:
        where = {part.key: name for name, shard in zip(names, shards, strict=True) for part in shard}
        index = {"metadata": {"total_size": sum(map(part_bytes, parts))}, "weight_map": where}
        files["model.safetensors.index.json"] = to_json(index)
    with new_directory(final) as temporary:
        for name, shard in zip(names, shards, strict=True):
            write_shard(temporary / name, shard, metadata={"format": "pt"})
        for name, content in files.items():
            write_file(temporary / name, [content])


def _hf_files(export: Export) -> dict[str, bytes]:
    config, eot = export.config, export.tokenizer.eot
    model = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocab_size,
        "n_positions": config.context, "n_ctx": config.context, "n_embd": config.width, "n_layer": config.n_layers,
        "n_head": config.n_heads, "n_inner": None if config.hidden == 4 * config.width else config.hidden,
        "activation_function": "gelu_new", "layer_norm_epsilon": config.norm_eps, "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout, "attn_pdrop": config.dropout, "initializer_range": 0.02,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
        "tie_word_embeddings": config.tied, "use_cache": True, "bos_token_id": eot, "eos_token_id": eot,
        "torch_dtype": str(export.dtype).removeprefix("torch."),
    }
    generation = {"_from_model_config": True, "bos_token_id": eot, "eos_token_id": eot}
    return {"config.json": to_json(model), "generation_config.json": to_json(generation)}
