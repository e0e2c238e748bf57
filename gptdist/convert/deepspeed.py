"""DeepSpeed's own checkpoint directories of this project's model: ZeRO 0 to 3, read without DeepSpeed.

    DIR/latest                                           holds the name of the newest folder
    DIR/global_step40/mp_rank_00_model_states.pt         names and shapes (ZeRO-3: zero_pp_rank_N_mp_rank_00_...)
    DIR/global_step40/zero_pp_rank_N_mp_rank_00_optim_states.pt   rank N's part of the fp32 weights

ZeRO-1 and 2 cut the concatenation of all parameters of a group into one range a rank; ZeRO-3 cuts each parameter.
The layout is that of deepspeed/utils/zero_to_fp32.py. The files are pickles: the few classes of DeepSpeed that they
name are replaced by empty stand-ins, anything else is refused.
"""

import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptdist import config as config_module
from gptdist.checkpoint.files import plain_name, user_errors
from gptdist.checkpoint.shards import Part
from gptdist.config import ModelConfig
from gptdist.convert import gpt2
from gptdist.convert.files import finite, is_plain, read_torch, tensor_parts
from gptdist.convert.foreign import Foreign
from gptdist.errors import UserError

_OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_0_)?mp_rank_(\d+)_model_states\.pt")
MOST_RANKS = 1 << 20  # that a checkpoint is saved by
_CONFIG_DEPTH = 2  # how many folders up config.yaml and tokenizer/ are looked for


class _Nothing:
    """Built where the pickle names one of DeepSpeed's classes; whatever it held is of no use here."""

    def __init__(self, *args):
        pass


class _Stage(int):
    """DeepSpeed's ZeroStageEnum."""


_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}


def _member(kind: object, name: object) -> _Stage:
    """What Python 3.11.0 to 3.11.3 pickles an enum's member as: getattr(ZeroStageEnum, "gradients"), and no other."""
    if kind is not _Stage or name not in _STAGES:
        raise pickle.UnpicklingError("Unsupported global: GLOBAL builtins.getattr")
    return _Stage(_STAGES[name])


STAND_INS = {
    "builtins.getattr": _member,
    "deepspeed.runtime.zero.config.ZeroStageEnum": _Stage,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Nothing,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Nothing,
    "deepspeed.utils.tensor_fragment.fragment_address": _Nothing,
}


def find_deepspeed(path: Path) -> Path | None:
    """The folder with the files: `path`, or the one that `path`/latest names."""
    if not path.is_dir():
        return None
    if any(_MODEL.fullmatch(p.name) or _OPTIM.fullmatch(p.name) for p in path.iterdir()):
        return path
    if not (path / "latest").is_file():
        return None
    with user_errors("read"):
        name = (path / "latest").read_bytes()[:1000].decode(errors="replace").strip()
    if not plain_name(name) or not (path / name).is_dir():
        raise UserError(f"{path / 'latest'} names {name!r}, which is no folder there; give the folder itself")
    return path / name


def read_deepspeed(folder: Path, config_path: str | None) -> Foreign:
    """The fp32 weights of a checkpoint folder.

    config_path: the training configuration (YAML); without it a config.yaml in the folder or above. Raises UserError
    if a rank's file is missing or the tensors are not those of the configured model.
    """
    above = (folder, *folder.absolute().parents[:_CONFIG_DEPTH])
    path = Path(config_path) if config_path else _first(above, "config.yaml")
    if path is None:
        raise UserError(f"{folder}: DeepSpeed's files do not hold the model's shape; give the run's configuration "
                        f"with --config, or put config.yaml beside them")
    config = config_module.load(str(path)).model
    parts = _named(_read_parts(folder))
    if "wte.weight" not in parts:
        raise UserError(f"{folder}: no tensor wte.weight: only checkpoints of this project's model can be imported")
    return Foreign(config=config, parts=parts, rows=parts["wte.weight"].shape[0], folders=above, layout="ours",
                   shape_source=str(path))


def check_ours(parts: Mapping[str, Part], config: ModelConfig, where: Path, source: str) -> list[Part]:
    """The parts as a checkpoint's `model.*`, fp32, after checking that they are this configuration's."""
    wanted = gpt2.shapes(config)
    missing, extra = sorted(wanted.keys() - parts.keys()), sorted(parts.keys() - wanted.keys())
    if missing or extra:
        raise UserError(f"{where}: {'no tensor ' + missing[0] if missing else extra[0] + ' is unknown'}: these are not "
                        f"the tensors of the model of {source}; give the run's own configuration")
    for name, shape in wanted.items():
        gpt2.check_shape(parts[name], shape, where, source)
    return [Part(f"model.{name}", torch.float32, shape, lambda part=parts[name]: part.get().to(torch.float32))
            for name, shape in wanted.items()]


def _first(folders: Sequence[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _named(parts: dict[str, Part]) -> dict[str, Part]:
    """Without the prefix of a wrapper around the model."""
    prefix = next((name.removesuffix("wte.weight") for name in parts if name.endswith("wte.weight")), "")
    return {name.removeprefix(prefix): part for name, part in parts.items()}


@dataclass(frozen=True)
class _Rank:
    """One rank's part of the fp32 weights: flat tensors, one or more a parameter group."""

    path: Path
    stage: int
    world: int
    flats: list[Tensor]
    paddings: list[list[int]] | None  # ZeRO-1 and 2: elements behind each parameter, by group
    step: int | None  # optimizer steps done, where the optimizer counts them


def _read_parts(folder: Path) -> dict[str, Part]:
    model_path = _model_file(folder)
    model = _table(read_torch(model_path, STAND_INS), model_path)
    if _optional_table(model, "frozen_param_shapes", model_path):
        raise UserError(f"{model_path}: the model has frozen parameters, which cannot be imported from ZeRO's files")
    ranks = _read_ranks(folder, model, model_path)
    if not ranks:
        return tensor_parts(model.get("module"), model_path)
    groups = _shapes(model, model_path)
    make = _parts_of_cut_parameters if ranks[0].stage == 3 else _parts_of_cut_groups
    parts = {part.key: part for part in make(groups, ranks)}
    for alias, name in _optional_table(model, "shared_params", model_path).items():
        if isinstance(name, str) and name in parts:
            parts.pop(alias, None)  # a tied head, which this project stores once
    return parts


def _model_file(folder: Path) -> Path:
    found = sorted(p.name for p in folder.iterdir() if _MODEL.fullmatch(p.name))
    if any(int(_MODEL.fullmatch(name)[1]) for name in found):
        raise UserError(f"{folder} was saved with tensor parallelism ({found[-1]}), which cannot be imported")
    if not found:
        raise UserError(f"{folder}: no mp_rank_00_model_states.pt (ZeRO-3: zero_pp_rank_0_mp_rank_00_model_states.pt), "
                        f"which has the tensors' names and shapes; get all files of the checkpoint")
    return folder / found[0]


def _read_ranks(folder: Path, model: Mapping, model_path: Path) -> list[_Rank]:
    """Every rank's file, in order; none for ZeRO-0, whose model file has the weights."""
    found = {int(m[1]): p for p in folder.iterdir() if (m := _OPTIM.fullmatch(p.name)) and int(m[2]) == 0}
    if not found:
        settings = _optional_table(model, "ds_config", model_path)
        stage = _optional_table(settings, "zero_optimization", model_path).get("stage", 0)
        if not isinstance(stage, int) or stage != 0:
            raise UserError(f"{folder}: ZeRO-{stage} weights are in zero_pp_rank_*_optim_states.pt, of which there is "
                            f"none; get all files of the checkpoint")
        return []
    ranks = [_read_rank(found[number]) for number in sorted(found)]
    world = ranks[0].world
    if sorted(found) != list(range(world)):
        absent = sorted(set(range(world)) - set(found))
        what = f"the file of rank {absent[0]} is missing" if absent else f"there are files of {len(found)} ranks"
        raise UserError(f"{folder}: saved by {world} ranks, but {what} (zero_pp_rank_N_mp_rank_00_optim_states.pt); "
                        f"get all files of one save")
    for rank in ranks:
        if (rank.stage, rank.world) != (ranks[0].stage, world) or len(rank.flats) != len(ranks[0].flats):
            raise UserError(f"{rank.path} was saved by {rank.world} ranks with ZeRO-{rank.stage}, {ranks[0].path.name} "
                            f"by {world} with ZeRO-{ranks[0].stage}; get all files of one save")
    _check_steps(ranks, model, model_path)
    return ranks


def _check_steps(ranks: Sequence[_Rank], model: Mapping, model_path: Path) -> None:
    """Raise UserError unless all files were saved after the same number of optimizer steps."""
    first = ranks[0]
    for rank in ranks:
        if rank.step != first.step:
            raise _other_step(rank.path, rank.step, first)
    done, skipped = model.get("global_steps"), model.get("skipped_steps", 0)
    if first.step is None or not isinstance(done, int) or not isinstance(skipped, int):
        return
    # Older versions of DeepSpeed begin with a step on zeros, which only the optimizer counts.
    if first.step - (done - skipped) not in (0, 1):
        raise _other_step(model_path, done - skipped, first)


def _other_step(path: Path, step: int | None, first: _Rank) -> UserError:
    return UserError(f"{path} was saved after step {step}, {first.path.name} after step {first.step}; "
                     f"get all files of one save")


def _read_rank(path: Path) -> _Rank:
    state = _table(_table(read_torch(path, STAND_INS), path).get("optimizer_state_dict"), path)
    stage, world = state.get("zero_stage"), state.get("partition_count")
    world = max(world) if isinstance(world, list) and world and _are_counts(world) else world
    if not isinstance(stage, int) or stage not in (1, 2, 3) or type(world) is not int or not 0 < world <= MOST_RANKS:
        raise UserError(f"{path}: no ZeRO stage and number of ranks in it; expected DeepSpeed's optimizer states")
    flats = state.get("fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups")
    if not isinstance(flats, list) or not all(isinstance(flat, Tensor) and flat.dim() == 1 for flat in flats):
        raise UserError(f"{path}: no flat fp32 weights in it; expected DeepSpeed's optimizer states")
    if not all(map(is_plain, flats)):
        raise UserError(f"{path}: its flat fp32 weights are no plain tensors that the file holds whole; get it again")
    paddings = state.get("param_alignment_paddings")
    if paddings is not None and not (isinstance(paddings, list) and all(map(_are_counts, paddings))):
        raise UserError(f"{path}: param_alignment_paddings is {str(paddings)[:40]!r}, expected lists of sizes; get the "
                        f"file again")
    return _Rank(path, int(stage), world, flats, paddings,
                 _step(state.get("optimizer_state_dict" if stage == 3 else "base_optimizer_state")))


def _step(optimizer: object) -> int | None:
    """The counter of an optimizer's state: torch keeps it by tensor, others by group."""
    match optimizer:
        case {"state": {0: {"step": step}}} | {"param_groups": [{"step": step}, *_]}:
            is_number = isinstance(step, int | float) or (isinstance(step, Tensor) and step.numel() == 1)
            return int(step) if is_number else None
    return None


def _table(value: Any, path: Path) -> Mapping:
    if not isinstance(value, Mapping):
        raise UserError(f"{path} holds a {type(value).__name__}, expected DeepSpeed's table of states")
    return value


def _optional_table(values: Mapping, key: str, path: Path) -> Mapping:
    """The table under a key; an empty one where there is none."""
    return {} if values.get(key) is None else _table(values[key], path)


def _shapes(model: Mapping, path: Path) -> list[dict[str, tuple[int, ...]]]:
    """name -> shape, by parameter group."""
    found = model.get("param_shapes")
    if not isinstance(found, list) or not all(isinstance(group, Mapping) for group in found):
        raise UserError(f"{path}: no param_shapes in it; expected DeepSpeed's model states")
    for group in found:
        for name, shape in group.items():
            if not isinstance(shape, list | tuple) or not _are_counts(shape):
                raise UserError(f"{path}: param_shapes has {str(shape)[:40]!r} for {name}, expected a shape; get the "
                                f"file again")
    return [{str(name): tuple(shape) for name, shape in group.items()} for group in found]


def _are_counts(values: object) -> bool:
    return isinstance(values, Sequence) and all(type(value) is int and 0 <= value < 1 << 40 for value in values)


def _parts_of_cut_groups(groups: list[dict], ranks: list[_Rank]) -> Iterator[Part]:
    """ZeRO-1 and 2: a group's parameters lie one behind the other in the ranks' flat tensors, one behind the other."""
    if len(groups) != len(ranks[0].flats):
        raise _no_fit(ranks[0], f"{len(ranks[0].flats)} flat tensors for {len(groups)} parameter groups")
    for number, shapes in enumerate(groups):
        flats, offset = [rank.flats[number] for rank in ranks], 0
        gaps = ranks[0].paddings[number:number + 1] if ranks[0].paddings else [[0] * len(shapes)]
        gaps = gaps[0] if gaps else []
        if len(gaps) != len(shapes):
            raise _no_fit(ranks[0], f"{len(gaps)} paddings for {len(shapes)} parameters")
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            yield _part(ranks[0].path.parent, name, shape, [(flats, offset, math.prod(shape))])
            offset += math.prod(shape) + gap
        _check_used(ranks[0], offset, sum(map(len, flats)), slack=2 * len(ranks))


def _parts_of_cut_parameters(groups: list[dict], ranks: list[_Rank]) -> Iterator[Part]:
    """ZeRO-3: each rank's flat tensors hold its n-th of every parameter, rounded up."""
    offset = 0
    for shapes in groups:
        for name, shape in shapes.items():
            size = -(-math.prod(shape) // len(ranks))
            yield _part(ranks[0].path.parent, name, shape, [(rank.flats, offset, size) for rank in ranks])
            offset += size
    for rank in ranks:
        _check_used(rank, offset, sum(map(len, rank.flats)), slack=1)


def _check_used(rank: _Rank, used: int, there: int, slack: int) -> None:
    """Both counts may end in padding, by which they differ: less than `slack` elements."""
    if abs(there - used) >= slack:
        raise _no_fit(rank, f"{there} elements, the parameters have {used}")


def _no_fit(rank: _Rank, why: str) -> UserError:
    return UserError(f"{rank.path}: {why}: the files are not of one model; get all files of one save")


def _part(where: Path, name: str, shape: tuple[int, ...], ranges: list[tuple[list[Tensor], int, int]]) -> Part:
    """A tensor from ranges (flats, start, count) of concatenated flat tensors, joined when it is read."""
    def get() -> Tensor:
        pieces = [piece for flats, start, count in ranges for piece in _cut(flats, start, count)]
        return finite(torch.cat(pieces)[:math.prod(shape)].view(shape), name, where)
    return Part(name, ranges[0][0][0].dtype if ranges[0][0] else torch.float32, shape, get)


def _cut(flats: Sequence[Tensor], start: int, count: int) -> Iterator[Tensor]:
    for flat in flats:
        if start < len(flat) and count > 0:
            piece = flat[start:start + count]
            yield piece
            count -= len(piece)
        start = max(start - len(flat), 0)
