"""A trained model's weights back from a checkpoint, adapters merged into what they adapt.

Adapters (lora.py) are of use only to the run that trains them. Everyone else, a new run as well, gets one set of
weights from a checkpoint with adapters, whether the base lies beside them or elsewhere (base.py).
"""

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from gptdist import config as config_module
from gptdist import lora
from gptdist.checkpoint import layout, store
from gptdist.checkpoint.base import base_of, weight_shapes
from gptdist.checkpoint.files import damaged
from gptdist.checkpoint.ranks import Ranks
from gptdist.checkpoint.stream import TensorReader
from gptdist.config import Config, LoRAConfig
from gptdist.data.tokenizer import Tokenizer
from gptdist.errors import UserError
from gptdist.model import GPT, Classifier, LanguageModel, build, build_meta
from gptdist.parallel.flat_shard import FlatShard
from gptdist.parallel.init import local_box


def read_config(checkpoint: str | os.PathLike) -> Config:
    """The resolved configuration saved in a checkpoint directory."""
    where = f"{checkpoint}/config.yaml"
    values = config_module.parse_yaml(layout.read_file(checkpoint, "config.yaml"), where)
    if not isinstance(values, dict):
        raise UserError(f"{where} holds a {type(values).__name__}, expected a run's configuration")
    return config_module.from_dict(values, where)


def load_model(checkpoint: Path, *, device: str | torch.device = "cpu",
               dtype: torch.dtype = torch.float32, verify: bool = True) -> tuple[LanguageModel, Tokenizer, Config]:
    """(model in eval mode, tokenizer, configuration) of a checkpoint that any strategy saved at any world size.

    verify: check every sha256 first. Raises UserError for an incomplete or damaged checkpoint.
    """
    if verify:
        layout.verify(checkpoint)
    config = read_config(checkpoint)
    refuse_classifier(checkpoint, config)
    check_depth(checkpoint, config)
    model = _fill(build_meta(config.model), checkpoint, device, dtype)
    return model, Tokenizer.load(checkpoint / "tokenizer"), config


def load_classifier(checkpoint: Path, *, device: str | torch.device = "cpu",
                    verify: bool = True) -> tuple[Classifier, Tokenizer, Config]:
    """As load_model, for a checkpoint of task.name=classify."""
    if verify:
        layout.verify(checkpoint)
    config = read_config(checkpoint)
    if config.task.name != "classify":
        raise UserError(f"{checkpoint} is no classifier, its task.name is {config.task.name}: train one with "
                        f"`gptdist finetune`, task.name=classify")
    check_depth(checkpoint, config)
    model = build(dataclasses.replace(config, lora=LoRAConfig()))  # adapters will be merged
    return _fill(model, checkpoint, device, torch.float32), Tokenizer.load(checkpoint / "tokenizer"), config


def refuse_classifier(checkpoint: str | os.PathLike, config: Config) -> None:
    """Raise UserError for a checkpoint that has no next-word head."""
    if config.task.name == "classify":
        raise UserError(f"{checkpoint} is a classifier, which writes no text; its labels are "
                        f"{', '.join(config.classify.labels)}: use `gptdist classify {checkpoint}`")


def check_depth(checkpoint: Path, config: Config) -> None:
    """Raise DamagedError where config.yaml has more blocks than the checkpoint has tensors: before they are made."""
    tensors = weight_shapes(checkpoint)
    if config.model.n_layers > len(tensors):
        raise damaged(checkpoint, f"its config.yaml has {config.model.n_layers} blocks, it has {len(tensors)} tensors")


def _fill(model: GPT, checkpoint: Path, device: str | torch.device, dtype: torch.dtype) -> GPT:
    shapes = weight_shapes(checkpoint)
    for name, parameter in model.named_parameters():  # before memory is asked for
        if (found := shapes.get(f"model.{name}")) != tuple(parameter.shape):
            raise damaged(checkpoint, f"it has model.{name} as {found}, its config.yaml gives {tuple(parameter.shape)}")
    model.to(dtype).to_empty(device=device)
    load_weights(checkpoint, {f"model.{name}": p.detach() for name, p in model.named_parameters()})
    return model.eval()


def load_weights(path: Path, tensors: Mapping[str, Tensor], process_group: dist.ProcessGroup | None = None,
                 **options) -> list[str]:
    """Fill `model.*` tensors as store.load does, any adapters merged in; a collective call, for any sharding.

    Adapters among `tensors` are left as they are: those of the checkpoint belong to the weights already.
    Raises UserError also where adapters have lost their base. Options go to store.load.
    """
    path, ranks = Path(path), Ranks(process_group)
    base, own = ranks.on_coordinator(lambda: (base_of(path), set(store.checked_index(path))))
    plain = {key: tensor for key, tensor in tensors.items() if not lora.is_adapter(key)}
    missing = []
    if base is not None:
        missing = load_weights(base, {key: t for key, t in plain.items() if key not in own}, process_group, **options)
        plain = {key: t for key, t in plain.items() if key in own}
    missing += store.load(path, plain, process_group, **options)
    if adapted := ranks.on_all(lambda: adapter_factors(path, own)):
        for key, (left, right) in adapted.items():
            if key in tensors:
                _add_product(tensors[key], left, right)
    return missing


def load_state(path: Path, state: Mapping[str, Tensor], process_group: dist.ProcessGroup | None = None) -> None:
    """Fill a run's whole state from one of its checkpoints, and from the base that this names; a collective call."""
    ranks = Ranks(process_group)
    base, own = ranks.on_coordinator(lambda: (base_of(path), set(store.checked_index(path))))
    if base is not None:
        elsewhere = {key: t for key, t in state.items() if key not in own and key.startswith("model.")}
        load_weights(base, elsewhere, process_group)
        state = {key: t for key, t in state.items() if key not in elsewhere}
    store.load(path, state, process_group)


def adapter_factors(checkpoint: Path, keys: Collection[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """key of an adapted weight -> (L, R) on the CPU, of which L R is to be added, for all adapters among `keys`."""
    layers = [key.removesuffix(".lora_A") for key in keys if key.endswith(".lora_A")]
    if not layers:
        return {}
    config = read_config(checkpoint)
    values = store.load_tensors(checkpoint, [f"{layer}.{side}" for layer in layers for side in ("lora_A", "lora_B")])
    return {f"{layer}.weight": lora.factors(values[f"{layer}.lora_A"], values[f"{layer}.lora_B"], config.lora,
                                            lora.head_rows(config.model, config.lora, layer)) for layer in layers}


@torch.no_grad()
def _add_product(tensor: Tensor, left: Tensor, right: Tensor) -> None:
    """tensor += left (out, rank) @ right (rank, in), of which this process may have any part."""
    if isinstance(tensor, FlatShard):
        width, start, stop = right.shape[1], tensor.start, tensor.start + tensor.flat.numel()
        rows = left[start // width:-(-stop // width)] @ right
        first = start // width * width  # of the rows' elements
        tensor.flat += rows.flatten()[start - first:stop - first].to(tensor.flat.device)
        return
    local, (row, column) = local_box(tensor)
    change = left[row:row + local.shape[0]] @ right[:, column:column + local.shape[1]]
    local += change.to(local.device)


class MergedReader:
    """The weights of a checkpoint one at a time, in their stored dtype: adapters merged in, the base read as well.

    merge: with False the adapters of this checkpoint are left out, and one gets what they were trained on.
    """

    def __init__(self, path: Path, *, merge: bool = True):
        self.path = path
        base = base_of(path)
        self._base = MergedReader(base) if base else None
        self._own = TensorReader(path)
        self._factors = adapter_factors(path, self._own.index) if merge else {}
        beside = self._base.index if self._base else {}
        self.index = beside | {key: entry for key, entry in self._own.index.items() if not lora.is_adapter(key)}

    def read(self, key: str) -> Tensor:
        value = self._own.read(key) if key in self._own.index else self._base.read(key)
        if key in self._factors:
            _add_product(value, *self._factors[key])
        return value
