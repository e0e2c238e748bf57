"""GPT-2 of Hugging Face's transformers: directories with config.json and safetensors or torch.save files.

The format: transformers' GPT2Config and GPT2LMHeadModel. Its block matrices are Conv1D's, (in, out).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from gptdist.checkpoint.files import plain_name
from gptdist.checkpoint.shards import Part
from gptdist.config import ModelConfig
from gptdist.convert import gpt2
from gptdist.convert.files import listed, memory_part, read_json, read_safetensors, read_torch, tensor_parts
from gptdist.convert.foreign import LARGEST_SIZE, Foreign, check_depth, exact_ratio, named_config
from gptdist.errors import UserError

_GELU = ("gelu_new", "gelu_pytorch_tanh")  # GELU's tanh approximation
# What older versions stored besides the weights: the causal mask.
_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
_STEMS = {"model.safetensors": read_safetensors,
          "pytorch_model.bin": lambda path: tensor_parts(read_torch(path), path)}


def is_hf(path: Path) -> bool:
    return (path / "config.json").is_file()


def read_hf(directory: Path) -> Foreign:
    """A GPT-2 model directory. Raises UserError for other architectures and for files that do not fit each other."""
    found = read_json(directory / "config.json")
    config, rows = model_config(found, directory / "config.json")
    weights = _read_weights(directory)
    check_depth(config, len(weights), directory / "config.json")
    parts = _our_names(weights, config, directory)
    wanted = gpt2.plain_shapes(config, rows)
    parts = {name: conv1d(name, part) for name, part in parts.items()}
    gpt2.check_plain(parts, wanted, directory, "config.json")
    return Foreign(config=config, parts=parts, rows=rows, folders=(directory,))


def model_config(found: Mapping, path: Path) -> tuple[ModelConfig, int]:
    """(our configuration with vocab_size as in config.json, that size) of a GPT-2 config.json."""
    if found.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type is {found.get('model_type')!r}, only 'gpt2' can be imported")
    expected = {"activation_function": _GELU, "scale_attn_weights": (True,), "add_cross_attention": (False,),
                "scale_attn_by_inverse_layer_idx": (False,)}
    for key, values in expected.items():
        if found.get(key, values[0]) not in values:
            raise UserError(f"{path}: {key} is {found[key]!r}, expected {' or '.join(map(repr, values))}: "
                            f"this variant of GPT-2 cannot be expressed")
    rows, width = _size(found, path, 50257, "vocab_size"), _size(found, path, 768, "n_embd", "hidden_size")
    inner = width * 4 if found.get("n_inner") is None else _size(found, path, 0, "n_inner")
    dropouts = {_number(found, path, key, 0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    return named_config(
        path, vocab_size=rows, width=width, mlp_ratio=exact_ratio(inner, width),
        context=_size(found, path, 1024, "n_positions", "max_position_embeddings", "n_ctx"),
        n_layers=_size(found, path, 12, "n_layer", "num_hidden_layers"),
        n_heads=_size(found, path, 12, "n_head", "num_attention_heads"),
        tied=_bool(found, path, "tie_word_embeddings"),
        norm_eps=_number(found, path, "layer_norm_epsilon", 1e-5),
        dropout=dropouts.pop() if len(dropouts) == 1 else 0.0), rows


def _size(found: Mapping, path: Path, default: int, *names: str) -> int:
    name = next((name for name in names if name in found), names[0])
    value = found.get(name, default)
    if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
        raise UserError(f"{path}: {name} is {_shown(value)}, expected a whole number from 1 to {LARGEST_SIZE}")
    return value


def _shown(value: object) -> str:
    try:
        return f"{value!r:.40}"
    except ValueError:  # a number of thousands of digits
        return "a number of thousands of digits"


def _number(found: Mapping, path: Path, name: str, default: float) -> float:
    value = found.get(name, default)
    if type(value) not in (int, float) or not abs(value) < float("inf"):
        raise UserError(f"{path}: {name} is {_shown(value)}, expected a number")
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{path}: {name} is {_shown(value)}, expected a number") from None


def _bool(found: Mapping, path: Path, name: str) -> bool:
    value = found.get(name, True)
    if not isinstance(value, bool):
        raise UserError(f"{path}: {name} is {value!r}, expected true or false")
    return value


def _read_weights(directory: Path) -> dict[str, Part]:
    """All tensors by their names in the files: of one file, or of the shards that an index names."""
    for name, read in _STEMS.items():
        single, index = directory / name, directory / f"{name}.index.json"
        stem, _, suffix = name.rpartition(".")
        shards = sorted(p.name for p in directory.glob(f"{stem}-*-of-*.{suffix}"))
        if single.exists() and (index.exists() or shards):
            raise UserError(f"{directory} holds {name} and shards ({index.name if index.exists() else shards[0]}): "
                            f"files of two saves; keep one of them")
        if single.exists():
            return read(single)
        if index.exists():
            return _read_shards(directory, index, shards, read)
        if shards:
            raise UserError(f"{directory} holds {shards[0]} but no {index.name}; get the index too")
    raise UserError(f"{directory}: no weights: expected model.safetensors or pytorch_model.bin, or their shards with "
                    f"an index.json")


def _read_shards(directory: Path, index: Path, present: list[str], read) -> dict[str, Part]:
    """The tensors of the shards; the index, the files and what is in them must agree exactly."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(plain_name(file) for file in where.values()):
        raise UserError(f"{index}: expected a weight_map from tensor to file name; get the index again")
    files = sorted(set(where.values()))
    if missing := [file for file in files if not (directory / file).is_file()]:
        raise UserError(f"{index} names {listed(missing)}, which is not in {directory}; get all files of the model")
    if extra := set(present) - set(files):
        raise UserError(f"{directory} holds {listed(extra)}, which {index.name} does not name: files of two saves; "
                        f"keep those of one")
    parts: dict[str, Part] = {}
    for file in files:
        found = read(directory / file)
        if absent := [key for key, f in where.items() if f == file and key not in found]:
            raise UserError(f"{directory / file} has no {listed(absent)}, which {index.name} places there; "
                            f"get all files of one save")
        if unknown := [key for key in found if where.get(key) != file]:
            raise UserError(f"{directory / file} holds {listed(unknown)}, which {index.name} does not place there; "
                            f"get all files of one save")
        parts |= found
    return parts


def _our_names(found: Mapping[str, Part], config: ModelConfig, where: Path) -> dict[str, Part]:
    """By our names; what is unknown keeps its own. GPT2Model's files lack the prefix `transformer.`."""
    ours = {gpt2.gpt2_name(name): name for name in gpt2.shapes(replace(config, tied=False))}
    parts: dict[str, Part] = {}
    for key, part in found.items():
        full = key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"
        if _BUFFER.fullmatch(full):
            continue
        if (name := ours.get(full, key)) in parts:
            raise UserError(f"{where}: {key} and {parts[name].key} are the same parameter: files of two saves; "
                            f"keep those of one")
        parts[name] = part
    if config.tied and "head.weight" in parts:
        check_tied(parts, where)
        del parts["head.weight"]
    return parts


def check_tied(parts: Mapping[str, Part], where: Path) -> None:
    """Raise UserError if a head that should be the token embedding differs from it."""
    head, embedding = parts["head.weight"], parts.get("wte.weight")
    if embedding is not None and (head.shape != embedding.shape or not head.get().equal(embedding.get())):
        raise UserError(f"{where}: {head.key} differs from {embedding.key}, but config.json ties them; "
                        f"if the model has its own head, set tie_word_embeddings to false there")


def conv1d(name: str, part: Part) -> Part:
    """A block's matrix with its dimensions exchanged: (in, out) <-> (out, in); other tensors as they are."""
    if not name.startswith("blocks.") or len(part.shape) != 2:
        return part
    return replace(part, shape=part.shape[::-1], get=lambda: part.get().t().contiguous())


def gpt2_to_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """State dict of `GPT2LMHeadModel` -> state dict of `LanguageModel(config)`, new tensors."""
    found = {key: memory_part(key, value) for key, value in state.items()}
    parts = {name: conv1d(name, part) for name, part in _our_names(found, config, Path("state dict")).items()}
    gpt2.check_plain(parts, gpt2.plain_shapes(config, config.vocab_size), "state dict", "the configuration")
    return {part.key.removeprefix("model."): part.get().clone() for part in gpt2.to_checkpoint(parts, config)}
