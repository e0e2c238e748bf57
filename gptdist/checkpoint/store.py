"""Saving and loading a checkpoint: any world size loads what any other saved.

`save` is atomic: a new temporary directory, every file fsynced, the manifest last, one rename. A failure on any rank is
the same error on every rank, and leaves nothing behind.
"""

import math
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException

from gptdist.checkpoint.files import FileRecord, damaged, fsync_dir, naming, plain_name, user_errors, write_file
from gptdist.checkpoint.index import INDEX_NAME, Entry, Index, decode
from gptdist.checkpoint.layout import (
    MANIFEST_NAME,
    Manifest,
    complete,
    encode_manifest,
    new_temporary,
    read_checked,
    step_name,
    verify,
)
from gptdist.checkpoint.ranks import Ranks
from gptdist.checkpoint.share import SharePlanner
from gptdist.checkpoint.storage import SafetensorsReader, SafetensorsWriter, read_boxes
from gptdist.errors import UserError


def save(
    root: str | os.PathLike,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    files: Mapping[str, bytes] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `root`/step-NNNNNNNN and return its path; a collective call.

    tensors: plain tensors (the same on every rank; written once), DTensors, or DCP's checkpointable subclasses.
    files: name (it may have a folder) -> content; only rank 0's are written.
    Raises UserError on every rank if the directory exists or anything cannot be written on any rank.
    """
    ranks = Ranks(process_group)
    return write(Path(root), step, SharePlanner(tensors, ranks.rank, ranks.world), files or {}, ranks)


def write(root: Path, step: int, planner: SharePlanner, files: Mapping[str, bytes], ranks: Ranks,
          note: Callable[[str], None] = lambda phase: None) -> Path:
    """`save` of what the planner holds. No rank returns or raises before all is published or cleaned away.

    note: called with the phase that begins or goes on: plan, write, seal, rename.
    """
    note("plan")
    temporary = ranks.on_coordinator(lambda: _begin(root, step))
    writer, error = SafetensorsWriter(temporary, lambda: note("write")), None
    try:
        try:
            _plan_and_write(writer, planner, ranks)
        except CheckpointException as e:  # raised on every rank
            error = _cause(e)
        if error is None:
            note("seal")
            return ranks.on_coordinator(lambda: _publish(root, step, temporary, writer.records, files, note))
        ranks.on_coordinator(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise error
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def load(
    path: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    process_group: dist.ProcessGroup | None = None,
    strict: bool = True,
    allow_missing: Callable[[str], bool] | None = None,
    grow: Collection[str] = (),
) -> list[str]:
    """Fill `tensors` in place from a complete checkpoint; a collective call. Returns the keys left as they were.

    Keys of the checkpoint that are not in `tensors` are ignored. A key that is not in the checkpoint is a UserError,
    unless `allow_missing(key)` or strict=False. Shapes must be equal; floating dtypes are converted.
    grow: keys whose tensor may have more rows than the checkpoint, which are left as they were (see grow.py).
    """
    path, ranks = Path(path), Ranks(process_group)
    index = ranks.on_coordinator(lambda: checked_index(path))
    index |= {key: _grown(index[key], tensors[key].shape) for key in grow if key in index and key in tensors}
    allowed = allow_missing or (lambda key: not strict)
    missing = ranks.on_all(lambda: _check_request(path, index, tensors, allowed))
    wanted = {key: tensor for key, tensor in tensors.items() if key in index}
    reader = SafetensorsReader(path, {key: index[key] for key in wanted})
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _dcp_call():
        dcp.load(
            wanted, storage_reader=reader, planner=planner, process_group=process_group, no_dist=not ranks.distributed
        )
    return missing


def verify_together(path: str | os.PathLike, process_group: dist.ProcessGroup | None = None) -> None:
    """`verify`, its work split over the ranks; a bad file is a UserError on every rank."""
    ranks = Ranks(process_group)
    ranks.on_all(lambda: verify(path, ranks.rank, ranks.world))


def read_index(path: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """key -> (shape, dtype) of every tensor in a complete checkpoint."""
    return {key: (entry.shape, entry.dtype) for key, entry in checked_index(Path(path)).items()}


def load_tensors(
    path: str | os.PathLike,
    keys: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, torch.Tensor]:
    """Whole tensors in this process alone (all of them without `keys`); `dtype` converts the floating ones."""
    path = Path(path)
    index = checked_index(path)
    keys = list(index) if keys is None else list(keys)
    if missing := [key for key in keys if key not in index]:
        raise _missing_error(path, missing, index)
    tensors = {key: _empty(index[key], dtype, device) for key in keys}
    reads = []
    for key in keys:
        for chunk in index[key].chunks:
            reads.append((chunk, index[key].dtype, (0,) * len(chunk.shape), _box(tensors[key], chunk)))
    read_boxes(path, reads)
    return tensors


def _begin(root: Path, step: int) -> Path:
    refuse_existing(root / step_name(step))
    with user_errors("create"):
        root.mkdir(parents=True, exist_ok=True)
        return new_temporary(root, step)


def _publish(
    root: Path, step: int, temporary: Path, shards: Mapping[str, FileRecord], files: Mapping[str, bytes],
    note: Callable[[str], None],
) -> Path:
    """Everything after the tensors: the other files, the manifest, the rename."""
    final = root / step_name(step)
    try:
        with user_errors("save to"):
            seal(temporary, step, shards, files)
            note("rename")
            refuse_existing(final)
            with naming(final):
                os.rename(temporary, final)
            fsync_dir(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def seal(temporary: Path, step: int, shards: Mapping[str, FileRecord], files: Mapping[str, bytes]) -> None:
    """Write the other files and the manifest beside the shards, and make all of it durable."""
    records = dict(shards)
    for name, content in files.items():
        assert plain_name(name, folders=True), name
        assert name not in {*records, MANIFEST_NAME}, name
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        records[name] = write_file(temporary / name, [content])
    write_file(temporary / MANIFEST_NAME, [encode_manifest(Manifest(step, records))])
    for folder in {(temporary / name).parent for name in records} | {temporary}:
        fsync_dir(folder)


def refuse_existing(final: Path) -> None:
    """Nothing that exists is ever overwritten."""
    if os.path.lexists(final):
        raise UserError(f"{final} already exists and is never overwritten; remove it, or choose another directory")


def _plan_and_write(writer: SafetensorsWriter, planner: SharePlanner, ranks: Ranks) -> None:
    if ranks.distributed:
        with torch.no_grad():
            dcp.save({}, storage_writer=writer, planner=planner, process_group=ranks.group)
        return
    # One process: dcp.save would warn of that, and hiding a warning is not safe in a thread.
    planner.set_up_planner({}, is_coordinator=True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    [plan] = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(planner.finish_plan(plan), planner).value()])


@contextmanager
def _dcp_call() -> Iterator[None]:
    """DCP without its warning that a single process is one, raising the failing rank's error in place of its own."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as e:
            raise _cause(e) from e


def _cause(error: CheckpointException) -> BaseException:
    """CheckpointException is raised on every rank with every rank's failure. A UserError hides no bug beside it."""
    causes = [cause for _, (cause, _) in sorted(error.failures.items())]
    for cause in causes:
        if not isinstance(cause, UserError):
            return RuntimeError(str(error)) if isinstance(cause, Exception) else cause
    causes[0].agreed = True
    return causes[0]


def checked_index(path: Path) -> Index:
    """index.json of a complete checkpoint, every file it names being in the manifest."""
    manifest = complete(path)
    index = decode(read_checked(path, INDEX_NAME, manifest.files[INDEX_NAME]), path / INDEX_NAME)
    claimed: dict[str, int] = {}
    for key, entry in index.items():
        for chunk in entry.chunks:
            claimed[chunk.file] = claimed.get(chunk.file, 0) + math.prod(chunk.shape) * entry.dtype.itemsize
            if chunk.file not in manifest.files:
                raise damaged(path, f"{key} lies in {chunk.file}, which {MANIFEST_NAME} does not name")
            if claimed[chunk.file] > manifest.files[chunk.file].size:  # memory is asked for before a file is read
                raise damaged(path, f"{INDEX_NAME} claims more bytes in {chunk.file} than it has, up to {key}")
    return index


def _grown(entry: Entry, shape: torch.Size) -> Entry:
    """The entry as if it had the rows of `shape`: DCP reads the boxes that there are, and asks for no others."""
    more_rows = len(shape) > 0 and tuple(shape[1:]) == entry.shape[1:] and shape[0] > entry.shape[0]
    return replace(entry, shape=tuple(shape)) if more_rows else entry


def _check_request(path: Path, index: Index, tensors: Mapping[str, torch.Tensor], allowed: Callable) -> list[str]:
    """The missing keys that may be missing; everything else that does not fit is an error."""
    missing = sorted(key for key in tensors if key not in index)
    if refused := [key for key in missing if not allowed(key)]:
        raise _missing_error(path, refused, index)
    for key in sorted(tensors.keys() - set(missing)):
        entry, tensor = index[key], tensors[key]
        assert tensor.device.type != "meta", f"{key} is on the meta device: allocate it before loading"
        if tuple(tensor.shape) != entry.shape:
            raise UserError(
                f"{key}: the checkpoint has {entry.shape}, this model wants {tuple(tensor.shape)}; "
                f"use the model configuration saved in {path}"
            )
        if tensor.dtype != entry.dtype and not (tensor.dtype.is_floating_point and entry.dtype.is_floating_point):
            raise UserError(
                f"{key}: the checkpoint has {entry.dtype}, this model wants {tensor.dtype}; only floats convert; "
                f"use the model configuration saved in {path}"
            )
    return missing


def _missing_error(path: Path, missing: list[str], index: Index) -> UserError:
    if all(key.startswith("optim.") for key in missing) and not any(key.startswith("optim.") for key in index):
        return UserError(f"{path} holds weights only, no optimizer state: it cannot be resumed; start from it with "
                         f"checkpoint.init_from={path}")
    names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return UserError(f"{path} has no {names} (it has {len(index)} tensors); use a checkpoint of the same kind of model")


def _empty(entry: Entry, dtype: torch.dtype | None, device: str | torch.device) -> torch.Tensor:
    convert = dtype is not None and entry.dtype.is_floating_point
    return torch.empty(entry.shape, dtype=dtype if convert else entry.dtype, device=device)


def _box(tensor: torch.Tensor, chunk) -> torch.Tensor:
    for dim, (start, size) in enumerate(zip(chunk.offset, chunk.shape, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor
