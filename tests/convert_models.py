"""Tiny models in other programs' formats, made here; nothing is downloaded."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from gptdist.checkpoint.restore import load_model
from gptdist.checkpoint.shards import Part
from gptdist.checkpoint.stream import write_checkpoint
from gptdist.config import ModelConfig
from gptdist.convert.gpt2 import shapes
from gptdist.convert.importer import checkpoint_files, import_model
from gptdist.data.tokenizer import EOT, Tokenizer
from gptdist.data.tokenizer_build import build

os.environ["HF_HUB_OFFLINE"] = "1"

SIZES = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
VOCAB = 300
TEXT = "It's 1234 o'clock,  isn't it?\n\tGrüße aus 東京 🎉  def f(x):\r\n    return x\n\n\n   "


def small_tokenizer() -> Tokenizer:
    return build(f"bpe:{VOCAB}", ["the function returns the value of the argument, and the error is raised. " * 9])


def gpt2(**options):
    """transformers' GPT-2, every parameter random, so that each one counts."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = {"vocab_size": VOCAB, "bos_token_id": VOCAB - 1, "eos_token_id": VOCAB - 1} | SIZES | options
    model = GPT2LMHeadModel(GPT2Config(**config))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def save_hf(model, folder: Path, form: str = "safetensors", tokenizer: Tokenizer | None = None) -> Path:
    """form: safetensors, safetensors-shards, bin, bin-shards, bin-legacy."""
    from gptdist.convert.tokenizer import hugging_face_files

    folder.mkdir(parents=True)
    if form.startswith("safetensors"):
        model.save_pretrained(folder, max_shard_size="30KB" if form.endswith("shards") else "1GB")
    else:
        model.config.save_pretrained(folder)
        _save_bin(model.state_dict(), folder, form)
    if tokenizer is not None:
        for name, content in hugging_face_files(tokenizer, 32).items():
            (folder / name).write_bytes(content)
    return folder


def _save_bin(state: dict[str, Tensor], folder: Path, form: str) -> None:
    if form != "bin-shards":
        zipped = form != "bin-legacy"
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return
    where = {name: f"pytorch_model-{1 + i % 2:05d}-of-00002.bin" for i, name in enumerate(state)}
    for file in set(where.values()):
        torch.save({name: state[name] for name, f in where.items() if f == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def imported(model, folder: Path, tokenizer: Tokenizer, form: str = "safetensors") -> Path:
    """A checkpoint made from a transformers model."""
    save_hf(model, folder / "hf", form, tokenizer)
    return import_model(str(folder / "hf"), str(folder / "checkpoint")).path


def random_checkpoint(path: Path, tokenizer: Tokenizer, **options) -> Path:
    """A checkpoint of this project's own, with random values everywhere, padding of the vocabulary included."""
    config = ModelConfig(**{"vocab_size": tokenizer.vocab_size, "context": 32, "width": 32, "n_layers": 2,
                            "n_heads": 4} | options)
    torch.manual_seed(1)
    tensors = {f"model.{name}": torch.randn(shape) / 8 for name, shape in shapes(config).items()}
    parts = [Part(key, t.dtype, tuple(t.shape), lambda t=t: t) for key, t in tensors.items()]
    write_checkpoint(path, 0, parts, checkpoint_files(config, tokenizer))
    return path


def logits(checkpoint: Path, tokens: Tensor) -> Tensor:
    model, _, _ = load_model(checkpoint)
    with torch.no_grad():
        return model.logits(model.hidden(tokens))


def hf_logits(model, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def some_tokens(T: int = 32) -> Tensor:
    return torch.randint(0, VOCAB, (2, T), generator=torch.Generator().manual_seed(1))


def nanogpt_checkpoint(model, *, bias: bool = True, prefix: str = "", rows: int = VOCAB) -> dict:
    """What nanoGPT's train.py saves, from a transformers model: Linear's (out, in), vocabulary padded to `rows`."""
    state = {}
    for name, value in model.state_dict().items():
        if not bias and name.endswith(".bias"):
            continue
        if value.dim() == 2 and ".h." in name:
            value = value.t().contiguous()
        if name in ("transformer.wte.weight", "lm_head.weight"):
            value = torch.cat([value, torch.ones(rows - len(value), value.shape[1])])
        state[prefix + name] = value
    args = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 32, "bias": bias, "vocab_size": rows,
            "dropout": 0.0}
    return {"model": state, "model_args": args, "optimizer": {"state": {}}, "iter_num": 3,
            "best_val_loss": torch.tensor(1.5), "config": {"batch_size": 4, "device": "cpu"}}


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return touch, (str(self.sentinel),)


def touch(path: str) -> None:
    Path(path).touch()


__all__ = ["EOT", "SIZES", "TEXT", "VOCAB", "Evil", "gpt2", "hf_logits", "imported", "logits", "nanogpt_checkpoint",
           "random_checkpoint", "save_hf", "small_tokenizer", "some_tokens"]
