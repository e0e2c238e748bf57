"""What one rank writes of the state, and its copy on the host for a save in the background.

DCP's own protocol (`__create_write_items__`, `__get_tensor_shard__`) is all that is asked of a tensor: DTensors, flat
partitions and other subclasses that DCP can save can also be staged, with nothing added to them.
"""

from collections.abc import Iterable, Mapping

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

Where = tuple[str, tuple[int, ...]]  # key, offset: names a box of the state


class SharePlanner(DefaultSavePlanner):
    """Plans to write this rank's share of `tensors`: its shards, and the plain tensors that are its to write."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], rank: int, world: int):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._plain = plain_keys(tensors)
        super().set_up_planner(own_share(tensors, rank, world))
        self._staged: tuple[list[WriteItem], dict[Where, torch.Tensor]] | None = None

    def stage(self, buffers: "HostBuffers") -> None:
        """Copy the share to the host. From here on the tensors may change, and only the copies are written."""
        with torch.no_grad():
            items = super().create_local_plan().items
            tensors = {where(item): super(SharePlanner, self).resolve_data(item).detach()
                       for item in items if item.type != WriteItemType.BYTE_IO}  # others are refused when saving
            self._staged = items, buffers.copy(tensors)
        self.state_dict = {}

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator: bool = False) -> None:
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        items = super().create_local_plan().items if self._staged is None else self._staged[0]
        return SavePlan(items, planner_data=self._plain)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return super().resolve_data(write_item) if self._staged is None else self._staged[1][where(write_item)]


class HostBuffers:
    """Memory that a rank's share is copied into: pinned where it comes from a GPU, kept from one save to the next."""

    def __init__(self) -> None:
        self._buffers: dict[Where, torch.Tensor] = {}

    def copy(self, tensors: Mapping[Where, torch.Tensor]) -> dict[Where, torch.Tensor]:
        """The copies, complete when this returns; the next call overwrites them."""
        self._buffers = {key: self._buffers[key] for key in tensors if key in self._buffers}
        for key, tensor in tensors.items():
            buffer = self._buffers.get(key)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[key] = buffer
            buffer.copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return dict(self._buffers)


def where(item: WriteItem) -> Where:
    return item.index.fqn, tuple(item.index.offset or ())


def plain_keys(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Those of which every rank has the whole."""
    return [key for key, tensor in tensors.items() if not hasattr(tensor, "__create_write_items__")]


def own_share(tensors: Mapping[str, torch.Tensor], rank: int, world: int) -> dict[str, torch.Tensor]:
    """`tensors` without the plain ones that other ranks write. Every rank comes to the same division by itself."""
    plain = [key for key in plain_keys(tensors) if isinstance(tensors[key], torch.Tensor)]
    sizes = {key: tensors[key].nbytes for key in plain}
    others = {key for key, owner in spread(sizes, world).items() if owner != rank}
    return {key: tensor for key, tensor in tensors.items() if key not in others}


def spread(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """name -> rank: the largest first, each to the rank with the fewest bytes so far."""
    loads, owners = [0] * world, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


def unwritten(plans: Iterable[SavePlan]) -> list[str]:
    """Plain tensors that a rank has but no rank is going to write: the ranks do not hold the same ones."""
    plans = list(plans)
    planned = {item.index.fqn for plan in plans for item in plan.items}
    return sorted({key for plan in plans for key in plan.planner_data or ()} - planned)
