"""`gptdist import`: another program's model -> a checkpoint, one tensor at a time."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from gptdist.checkpoint.layout import MANIFEST_NAME
from gptdist.checkpoint.shards import Part
from gptdist.checkpoint.store import refuse_existing
from gptdist.checkpoint.stream import write_checkpoint
from gptdist.config import Config, ModelConfig, TrainConfig, to_yaml
from gptdist.convert import gpt2
from gptdist.convert.deepspeed import check_ours, find_deepspeed, read_deepspeed
from gptdist.convert.foreign import Foreign
from gptdist.convert.hf import is_hf, read_hf
from gptdist.convert.nanogpt import find_nanogpt, read_nanogpt
from gptdist.convert.tokenizer import find_tokenizer, named_tokenizer
from gptdist.data.tokenizer import Tokenizer
from gptdist.errors import UserError
from gptdist.trainer import TrainState

FORMATS = ("hf", "nanogpt", "deepspeed")
# A vocabulary may have this many rows more than its tokenizer has ids, if it is padded to a multiple as GPUs like it.
_PADDING_LIMIT, _PADDING_MULTIPLE = 128, 64


@dataclass(frozen=True)
class Imported:
    """What was written."""

    path: Path
    format: str
    config: ModelConfig
    parameters: int
    note: str


def import_model(source: str, output: str, *, tokenizer: str | None = None, format: str = "auto",
                 config: str | None = None) -> Imported:
    """Write the checkpoint directory `output` from `source`: weights only, step 0.

    tokenizer: see `named_tokenizer`; without it, the one beside the model. config: the training configuration of a
    DeepSpeed checkpoint. Raises UserError for anything that does not fit together; then nothing is written.
    """
    path, final = Path(source), Path(output)
    refuse_existing(final)
    format = _detect(path) if format == "auto" else _check_format(format)
    if config is not None and format != "deepspeed":
        raise UserError(f"--config belongs to DeepSpeed's checkpoints; {path} ({format}) says its shape itself")
    foreign = _read(path, format, config)
    found, note = named_tokenizer(tokenizer) if tokenizer else find_tokenizer(foreign.folders), foreign.note
    if found is None:
        raise UserError(f"{path}: no tokenizer beside the model (tokenizer.json, or vocab.json and merges.txt); "
                        f"give one with --tokenizer PATH")
    if tokenizer and _differs_from_own(found, foreign):
        note = "; ".join(filter(None, [note, f"--tokenizer {tokenizer} is not the tokenizer beside the model"]))
    model = _fit_vocabulary(foreign, found, path)
    parts = (gpt2.to_checkpoint(foreign.parts, model) if foreign.layout == "plain"
             else check_ours(foreign.parts, model, path, foreign.shape_source))
    write_checkpoint(final, 0, parts, checkpoint_files(model, found))
    return Imported(final, format, model, _count(parts), note)


def _differs_from_own(tokenizer: Tokenizer, foreign: Foreign) -> bool:
    try:
        own = find_tokenizer(foreign.folders)
    except UserError:  # it cannot be read, which is a reason to give another
        return False
    return own is not None and own.hash != tokenizer.hash


def _count(parts: list[Part]) -> int:
    return sum(math.prod(part.shape) for part in parts)


def _check_format(format: str) -> str:
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}, expected auto, {', '.join(FORMATS)}")
    return format


def _detect(path: Path) -> str:
    if not path.exists():
        raise UserError(f"{path} does not exist; give a model's directory, or nanoGPT's ckpt.pt")
    if (path / MANIFEST_NAME).exists() or (path / "checkpoints").is_dir():
        raise UserError(f"{path} is a checkpoint or run of gptdist already: use it as it is")
    if is_hf(path):
        return "hf"
    if find_nanogpt(path):
        return "nanogpt"
    if find_deepspeed(path):
        return "deepspeed"
    raise UserError(f"{path}: unknown format; expected a directory with config.json (Hugging Face), ckpt.pt (nanoGPT), "
                    f"or mp_rank_00_model_states.pt (DeepSpeed; or `latest`, which names the folder)")


def _read(path: Path, format: str, config: str | None) -> Foreign:
    if format == "hf":
        if not is_hf(path):
            raise UserError(f"{path}: no config.json in it; expected a model directory of Hugging Face")
        return read_hf(path)
    found = find_nanogpt(path) if format == "nanogpt" else find_deepspeed(path)
    if found is None:
        expected = "ckpt.pt" if format == "nanogpt" else "mp_rank_00_model_states.pt, or `latest`"
        raise UserError(f"{path}: not a checkpoint of {format}: expected {expected}")
    return read_nanogpt(found) if format == "nanogpt" else read_deepspeed(found, config)


def _fit_vocabulary(foreign: Foreign, tokenizer: Tokenizer, path: Path) -> ModelConfig:
    """The configuration with the tokenizer's vocabulary, if the model's rows are that, or that with padding."""
    size, rows = tokenizer.vocab_size, foreign.rows
    config = replace(foreign.config, vocab_size=size)
    if foreign.layout == "ours":
        fits = foreign.config.vocab_size in (None, size) and config.padded_vocab == rows
    else:
        fits = rows == size or (size < rows < size + _PADDING_LIMIT and rows % _PADDING_MULTIPLE == 0)
    if not fits:
        raise UserError(f"{path}: the model's vocabulary has {rows} rows, tokenizer {tokenizer.name} has {size}: they "
                        f"do not belong together; give the model's own with --tokenizer PATH")
    return config


def checkpoint_files(model: ModelConfig, tokenizer: Tokenizer) -> dict[str, bytes]:
    """What stands beside the tensors, as the trainer writes it: the state of a run that has done no step."""
    tokens = model.context * max(1, TrainConfig().tokens_per_step // model.context)
    config = Config(model=model, train=TrainConfig(tokens_per_step=tokens))
    return {"config.yaml": to_yaml(config).encode(),
            "train_state.json": TrainState().encode(),
            **{f"tokenizer/{name}": data for name, data in tokenizer.files().items()}}
