"""GGUF, the format of llama.cpp, through the gguf package: architecture gpt2.

As llama.cpp's own converter, vectors and positions are fp32 whatever the type of the matrices; a tied head is stored
once (llama.cpp falls back to the token embedding).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptdist.checkpoint.files import naming
from gptdist.checkpoint.shards import Part
from gptdist.checkpoint.stream import new_file
from gptdist.convert.exporter import Export
from gptdist.convert.tokenizer import printable
from gptdist.data.tokenizer import GPT2_PATTERN
from gptdist.errors import MissingError, UserError

_NAMES = {"wte.weight": "token_embd.weight", "wpe.weight": "position_embd.weight", "head.weight": "output.weight",
          "ln_f.weight": "output_norm.weight", "ln_f.bias": "output_norm.bias"}
_BLOCK = {"ln_1": "attn_norm", "attn.qkv": "attn_qkv", "attn.proj": "attn_output", "ln_2": "ffn_norm",
          "mlp.fc": "ffn_up", "mlp.proj": "ffn_down"}


def gguf_name(name: str) -> str:
    """blocks.0.attn.qkv.bias -> blk.0.attn_qkv.bias"""
    if name in _NAMES:
        return _NAMES[name]
    _, layer, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_BLOCK[module]}.{kind}"


def write_gguf(export: Export, final: Path) -> None:
    """One GGUF file. Raises MissingError without the gguf package, UserError for a tokenizer llama.cpp has not."""
    try:
        import gguf
    except ImportError as error:
        raise MissingError("the gguf package is not installed: pip install 'gptdist[convert]'") from error
    if export.tokenizer.pattern != GPT2_PATTERN:
        raise UserError(f"{export.checkpoint}: its tokenizer has its own split pattern, which llama.cpp does not know; "
                        f"only tokenizers with GPT-2's pattern can be exported as GGUF")
    parts = list(_parts(export))
    with new_file(final) as temporary:
        writer = gguf.GGUFWriter(None, "gpt2")
        _add_metadata(writer, export)
        _add_tokenizer(writer, export)
        for part in parts:
            size = int(np.prod(part.shape)) * part.dtype.itemsize
            writer.add_tensor_info(part.key, part.shape, np.dtype(np.float32), size, raw_dtype=_type(part.dtype))
        with naming(final), contextlib.closing(writer):
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for part in parts:
                writer.write_tensor_data(_bytes(part.get()))


def _parts(export: Export) -> Iterator[Part]:
    """The tensors under GGUF's names, vectors and positions in fp32."""
    for part, full in zip(export.parts(export.dtype), export.parts(torch.float32), strict=True):
        chosen = full if len(part.shape) == 1 or part.key == "wpe.weight" else part
        yield replace(chosen, key=gguf_name(part.key))


def _type(dtype: torch.dtype):
    from gguf import GGMLQuantizationType as Type

    return {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}[dtype]


def _bytes(value: Tensor) -> np.ndarray:
    return value.contiguous().view(-1).view(torch.uint8).numpy()


def _add_metadata(writer, export: Export) -> None:
    from gguf import LlamaFileType

    config = export.config
    kinds = {torch.float32: LlamaFileType.ALL_F32, torch.float16: LlamaFileType.MOSTLY_F16,
             torch.bfloat16: LlamaFileType.MOSTLY_BF16}
    writer.add_name(export.checkpoint.name)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_file_type(kinds[export.dtype])
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer, export: Export) -> None:
    from gguf import TokenType

    tokenizer = export.tokenizer
    vocab, merges = printable(tokenizer)
    text = {i: token for token, i in vocab.items()}
    specials = set(tokenizer.specials.values())
    types = [TokenType.UNUSED if i not in text else TokenType.CONTROL if i in specials else TokenType.NORMAL
             for i in range(tokenizer.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([text.get(i, f"[PAD{i}]") for i in range(tokenizer.vocab_size)])
    writer.add_token_types(types)
    if merges:
        writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)
