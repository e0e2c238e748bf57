"""nanoGPT's ckpt.pt (karpathy/nanoGPT, train.py): {model, optimizer, model_args, iter_num, best_val_loss, config}."""

from collections.abc import Mapping
from pathlib import Path

from gptdist.config import ModelConfig
from gptdist.convert import gpt2
from gptdist.convert.files import read_torch, tensor_parts
from gptdist.convert.foreign import Foreign, check_depth, named_config
from gptdist.convert.hf import check_tied
from gptdist.errors import UserError

_PREFIX = "_orig_mod."  # torch.compile's wrapper
_ARGS = {"n_layer": "n_layers", "n_head": "n_heads", "n_embd": "width", "block_size": "context",
         "vocab_size": "vocab_size"}
_NOTE = ("nanoGPT computes the exact GELU, this model GPT-2's tanh approximation of it: "
         "logits differ from nanoGPT's by about 1e-3")


def find_nanogpt(path: Path) -> Path | None:
    """The checkpoint file that `path` is or holds."""
    if path.is_file() and path.suffix == ".pt":
        return path
    return path / "ckpt.pt" if (path / "ckpt.pt").is_file() else None


def read_nanogpt(path: Path) -> Foreign:
    """A nanoGPT checkpoint. Raises UserError for other content. Its optimizer is not imported."""
    found = read_torch(path)
    if not isinstance(found, Mapping) or not {"model", "model_args"} <= found.keys():
        raise UserError(f"{path}: expected nanoGPT's 'model' and 'model_args'; "
                        f"use the ckpt.pt that nanoGPT's train.py wrote")
    config, tensors = _model_config(found["model_args"], path), tensor_parts(found["model"], path)
    check_depth(config, len(tensors), path)
    ours = {gpt2.gpt2_name(name): name for name in gpt2.shapes(config)} | {"lm_head.weight": "head.weight"}
    named = {key.removeprefix(_PREFIX): part for key, part in tensors.items()}
    parts = {ours.get(key, key): part for key, part in named.items()
             if not key.endswith((".attn.bias", ".attn.masked_bias"))}
    if "head.weight" in parts:  # always tied
        check_tied(parts, path)
        del parts["head.weight"]
    gpt2.check_plain(parts, gpt2.plain_shapes(config, config.vocab_size), path, "model_args")
    return Foreign(config=config, parts=parts, rows=config.vocab_size, folders=(path.parent,), note=_NOTE)


def _model_config(args: object, path: Path) -> ModelConfig:
    if not isinstance(args, Mapping) or (missing := [key for key in (*_ARGS, "bias") if key not in args]):
        detail = "" if not isinstance(args, Mapping) else f", it lacks {', '.join(missing)}"
        raise UserError(f"{path}: 'model_args' is not nanoGPT's{detail}; use the ckpt.pt that its train.py wrote")
    for key in _ARGS:
        if type(args[key]) is not int or args[key] < 1:
            raise UserError(f"{path}: model_args {key} is {args[key]!r}, expected a whole number of at least 1")
    sizes = {ours: args[theirs] for theirs, ours in _ARGS.items()}
    dropout, bias = args.get("dropout", 0.0), args["bias"]
    if not isinstance(dropout, int | float | None) or not 0 <= (dropout or 0) < 1:
        raise UserError(f"{path}: model_args dropout is {dropout!r:.40}, expected a number from 0 to below 1")
    if not isinstance(bias, bool | int):
        raise UserError(f"{path}: model_args bias is {bias!r:.40}, expected true or false")
    return named_config(path, **sizes, bias=bool(bias), dropout=float(dropout or 0))
