"""Storage for torch.distributed.checkpoint (DCP): it plans and reshards, this writes and reads. Nothing is pickled.

DCP's own FileSystemWriter keeps its index in a pickle (.metadata). Here each rank streams one safetensors file and the
coordinator writes index.json.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint import Metadata, SavePlan, SavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from gptdist.checkpoint.files import FileRecord, user_errors, write_file
from gptdist.checkpoint.index import INDEX_NAME, Chunk, Entry, Index, encode
from gptdist.checkpoint.shards import DTYPES, Part, ShardFile, write_shard
from gptdist.checkpoint.share import unwritten


class SafetensorsWriter(StorageWriter):
    """Writes shard-NNNNN.safetensors and index.json into an existing, empty directory.

    Afterwards `records`, on the coordinator, has size and sha256 of every file written. `note` is called as it goes on.
    """

    def __init__(self, path: Path, note: Callable[[], None]):
        self.path, self._note = path, note
        self.records: dict[str, FileRecord] = {}

    def reset(self, checkpoint_id=None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args, **kwargs) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse what safetensors cannot hold, and drop the empty shards of uneven sharding."""
        for item in plan.items:
            _check_storable(item)
        return replace(plan, items=[item for item in plan.items if _worth_writing(item)])

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        if lost := unwritten(plans):
            raise RuntimeError(f"checkpoint: no rank would write {lost[0]} ({len(lost)} such): every rank must pass "
                               f"the same plain tensors")
        return [replace(plan, storage_data=f"shard-{i:05d}.safetensors") for i, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        file, results = plan.storage_data, []
        if plan.items:
            parts = [_part(item, planner, self._note) for item in plan.items]
            with user_errors("save to"):
                record = write_shard(self.path / file, parts)
            # The first result is about the file, the others each about a chunk: (file, key).
            results = [WriteResult(MetadataIndex(file), record.size, record)]
            for item, part in zip(plan.items, parts, strict=True):
                results.append(WriteResult(item.index, 0, (file, part.key)))
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        where = {}
        for record, *chunks in filter(None, results):
            self.records[record.index.fqn] = record.storage_data
            where |= {(c.index.fqn, tuple(c.index.offset)): c.storage_data for c in chunks}
        index: Index = {}
        for key, tensor in metadata.state_dict_metadata.items():
            spans = [(tuple(c.offsets), tuple(c.sizes)) for c in tensor.chunks]
            chunks = tuple(Chunk(offset, shape, *where[key, offset]) for offset, shape in spans)
            index[key] = Entry(tensor.properties.dtype, tuple(tensor.size), chunks)
        with user_errors("save to"):
            self.records[INDEX_NAME] = write_file(self.path / INDEX_NAME, [encode(index)])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


def _check_storable(item: WriteItem) -> None:
    if item.type == WriteItemType.BYTE_IO:
        raise TypeError(f"checkpoint: {item.index.fqn} is not a tensor; only tensors can be saved")
    dtype = item.tensor_data.properties.dtype
    if dtype not in DTYPES:
        raise TypeError(f"checkpoint: {item.index.fqn} has dtype {dtype}, which cannot be saved")


def _worth_writing(item: WriteItem) -> bool:
    return item.tensor_data.chunk.sizes.numel() > 0 or item.tensor_data.size.numel() == 0


def _part(item: WriteItem, planner: SavePlanner, note: Callable[[], None]) -> Part:
    chunk, dtype = item.tensor_data.chunk, item.tensor_data.properties.dtype
    whole = chunk.sizes == item.tensor_data.size
    key = item.index.fqn if whole else f"{item.index.fqn}@{','.join(map(str, chunk.offsets))}"

    def get() -> torch.Tensor:
        note()
        return planner.resolve_data(item)

    return Part(key, dtype, tuple(chunk.sizes), get)


class SafetensorsReader(StorageReader):
    """Reads what SafetensorsWriter wrote, given the checked index; only the needed boxes of each chunk."""

    def __init__(self, path: Path, index: Index):
        self.path, self.index = path, index

    def reset(self, checkpoint_id=None) -> None:
        pass

    def read_metadata(self) -> Metadata:
        return Metadata({key: _tensor_metadata(entry) for key, entry in self.index.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args, **kwargs) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        chunks = {(key, c.offset): (c, entry.dtype) for key, entry in self.index.items() for c in entry.chunks}
        reads = []
        for item in plan.items:
            where = item.storage_index
            target = planner.resolve_tensor(item).detach()
            reads.append((*chunks[where.fqn, tuple(where.offset)], item.storage_offsets, target))
        read_boxes(self.path, reads)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


def read_boxes(path: Path, reads: Sequence[tuple[Chunk, torch.dtype, Sequence[int], torch.Tensor]]) -> None:
    """Copy boxes of chunks into tensors: (chunk, stored dtype, offset of the box inside the chunk, target)."""
    by_file: dict[str, list] = {}
    for read in reads:
        by_file.setdefault(read[0].file, []).append(read)
    for name, group in by_file.items():
        with user_errors("read"), ShardFile(path / name) as shard:
            for chunk, dtype, offsets, target in group:
                shard.read(chunk.key, chunk.shape, dtype, offsets, target)


def _tensor_metadata(entry: Entry) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape)) for c in entry.chunks]
    return TensorStorageMetadata(TensorProperties(entry.dtype), torch.Size(entry.shape), chunks)


def _done(value) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future
