"""Checkpoint directories on disk: which are complete, which is the latest or the best, and removing old ones.

    checkpoints/step-00000040/  shard-00000.safetensors ...  index.json  train_state.json  config.yaml  MANIFEST.json
    checkpoints/.tmp-...        being written or being deleted; never read

MANIFEST.json holds size and sha256 of every other file. A directory gets its step-* name by one rename after all of it
is on disk, so an incomplete one was damaged later. Files the manifest does not name are never opened.
"""

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from gptdist.checkpoint.files import FileRecord, damaged, hash_file, plain_name, user_errors
from gptdist.checkpoint.index import FORMAT, INDEX_NAME, check_format
from gptdist.checkpoint.share import spread
from gptdist.errors import DamagedError, UserError

MANIFEST_NAME = "MANIFEST.json"
TRAIN_STATE_NAME = "train_state.json"
_STEP_DIR = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Manifest:
    step: int
    files: dict[str, FileRecord]  # by name relative to the directory, "/" between folders


def step_name(step: int) -> str:
    """40 -> step-00000040."""
    assert step >= 0, step
    return f"step-{step:08d}"


def encode_manifest(manifest: Manifest) -> bytes:
    files = {name: asdict(record) for name, record in sorted(manifest.files.items())}
    return (json.dumps({"format": FORMAT, "step": manifest.step, "files": files}, indent=1) + "\n").encode()


def complete(path: str | os.PathLike) -> Manifest:
    """The manifest, after checking that its format is known and every file is there in its size; reads no other file.

    Raises UserError naming the file at fault.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    for name, record in manifest.files.items():
        try:
            size = os.stat(path / name).st_size
        except FileNotFoundError as e:
            raise _incomplete(path, f"{name}: {e.strerror}") from None
        except OSError as e:
            raise UserError(f"cannot read {path / name}: {e.strerror}") from None
        if size != record.size:
            raise _incomplete(path, f"{name} has {size} bytes, expected {record.size}")
    return manifest


def verify(path: str | os.PathLike, rank: int = 0, world: int = 1) -> None:
    """Compare the sha256 of every file with the manifest; rank r of `world` hashes its share of the bytes.

    Raises UserError naming the bad file, on the rank that found it.
    """
    path = Path(path)
    manifest = complete(path)
    for name in _share(manifest.files, rank, world):
        with user_errors("read"):
            found = hash_file(path / name)
        if found != manifest.files[name]:
            raise damaged(path / name, "its checksum is wrong")


def read_file(path: str | os.PathLike, name: str) -> bytes:
    """A small file of a complete checkpoint (config.yaml, tokenizer/...), checked against its sha256."""
    path = Path(path)
    record = complete(path).files.get(name)
    if record is None:
        raise _incomplete(path, f"it has no {name}")
    return read_checked(path, name, record)


def read_checked(path: Path, name: str, record: FileRecord) -> bytes:
    with user_errors("read"):
        data = (path / name).read_bytes()
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise damaged(path / name, "its checksum is wrong")
    return data


def read_table(path: str | os.PathLike, name: str) -> dict:
    """A JSON file of a complete checkpoint, checked against its sha256, as a dict."""
    try:
        table = json.loads(read_file(path, name))
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise _incomplete(Path(path), f"{name} is not a JSON table")
    return table


def read_train_state(path: str | os.PathLike) -> dict:
    """train_state.json as a dict."""
    return read_table(path, TRAIN_STATE_NAME)


def scan(root: str | os.PathLike) -> tuple[list[Path], list[tuple[Path, str]]]:
    """(complete checkpoints in step order, [(other step-* directory, why it is not complete)])."""
    good, bad = [], []
    for path in _step_dirs(Path(root)):
        try:
            complete(path)
            good.append(path)
        except UserError as e:
            bad.append((path, str(e)))
    return good, bad


def latest(root: str | os.PathLike) -> Path | None:
    """The complete checkpoint of the highest step."""
    for path in reversed(_step_dirs(Path(root))):
        try:
            complete(path)
            return path
        except UserError:
            continue
    return None


def best(root: str | os.PathLike) -> Path | None:
    """The complete checkpoint with the lowest val_loss in its train_state.json (of equals the later one)."""
    return _best(scan(root)[0])


def resolve(path: str | os.PathLike, which: str = "latest") -> Path:
    """The checkpoint that `path` means: a checkpoint directory, a run directory, or a directory of step-* directories.

    which: "latest" or "best", where there are several. Raises UserError saying what was looked for.
    """
    assert which in ("latest", "best"), which
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no checkpoint: {path} is not a directory; give a checkpoint or a run directory")
    if (path / MANIFEST_NAME).exists() or _STEP_DIR.fullmatch(path.name):
        complete(path)
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = best(root) if which == "best" else latest(root)
    if found is None:
        raise UserError(_not_found(root, which))
    return found


def prune(root: str | os.PathLike, keep_last: int, keep_best: bool = True) -> list[Path]:
    """Remove complete checkpoints except the last `keep_last` (at least 1) and the best one; returns those removed."""
    if keep_last < 1:
        raise UserError(f"keep_last is {keep_last}, expected at least 1")
    good, _ = scan(root)
    kept = {*good[-keep_last:], _best(good) if keep_best else None}
    removed = [path for path in good if path not in kept]
    for path in removed:
        with user_errors("remove"):
            shutil.rmtree(_hide(path, "delete"))
    return removed


def is_damaged(path: str | os.PathLike) -> bool:
    """Whether a directory is broken for good, rather than unreadable just now or of a newer format."""
    try:
        complete(path)
    except DamagedError:
        return True
    except UserError:
        return False
    return False


def step_of(path: str | os.PathLike) -> int:
    """step-00000040 -> 40."""
    return int(_STEP_DIR.fullmatch(Path(path).name)[1])


def set_aside(path: str | os.PathLike) -> Path:
    """Rename a damaged checkpoint so that its step can be saved again; returns the new path, which nothing removes."""
    path = Path(path)
    target = path.with_name(f"damaged-{path.name}-{secrets.token_hex(4)}")
    with user_errors("rename"):
        os.rename(path, target)
    return target


def clean_stale(root: str | os.PathLike) -> list[Path]:
    """Remove what dead runs left half-written or half-deleted. Only at the start of a run: it would hit a save."""
    root = Path(root)
    stale = sorted(p for p in root.glob(".tmp-*") if p.is_dir() and not p.is_symlink()) if root.is_dir() else []
    for path in stale:
        with user_errors("remove"):
            shutil.rmtree(path)
    return stale


def new_temporary(root: Path, step: int) -> Path:
    """A new empty directory to write a checkpoint in."""
    path = root / f".tmp-{step_name(step)}-{secrets.token_hex(4)}"
    os.mkdir(path)
    return path


def _hide(path: Path, why: str) -> Path:
    """Rename a checkpoint so that no reader takes it for complete while it is being deleted."""
    hidden = path.with_name(f".tmp-{why}-{path.name}-{secrets.token_hex(4)}")
    os.rename(path, hidden)
    return hidden


def _step_dirs(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    found = [(int(m[1]), p) for p in root.iterdir() if (m := _STEP_DIR.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def _best(good: Iterable[Path]) -> Path | None:
    losses = [(loss, path) for path in good if (loss := _val_loss(path)) is not None]
    return min(reversed(losses), key=lambda pair: pair[0], default=(None, None))[1]


def _val_loss(path: Path) -> float | None:
    try:
        loss = read_train_state(path).get("val_loss")
    except UserError:
        return None
    number = isinstance(loss, int | float) and not isinstance(loss, bool)
    return loss if number and math.isfinite(loss) else None


def _not_found(root: Path, which: str) -> str:
    good, bad = scan(root)
    if good:
        return f"no {which} checkpoint: none of the {len(good)} in {root} records a val_loss; use the latest"
    reasons = f" ({len(bad)} incomplete, the last one: {bad[-1][1]})" if bad else ""
    return f"no checkpoint: {root} holds no complete step-* directory{reasons}; give a checkpoint or a run directory"


def _share(files: dict[str, FileRecord], rank: int, world: int) -> list[str]:
    """This rank's files."""
    owners = spread({name: record.size for name, record in files.items()}, world)
    return [name for name, owner in owners.items() if owner == rank]


def _read_manifest(path: Path) -> Manifest:
    try:
        data = json.loads((path / MANIFEST_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as e:
        raise _incomplete(path, f"{MANIFEST_NAME}: {e.strerror}") from None
    except OSError as e:
        raise UserError(f"cannot read {path / MANIFEST_NAME}: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise _incomplete(path, f"{MANIFEST_NAME} is not JSON") from None
    if not isinstance(data, dict):
        raise _incomplete(path, f"{MANIFEST_NAME} is not a table")
    check_format(data.get("format"), path / MANIFEST_NAME)
    match data:
        case {"step": int(step), "files": dict(files)} if INDEX_NAME in files:
            return Manifest(step, {name: _record(path, name, value) for name, value in files.items()})
    raise _incomplete(path, f"{MANIFEST_NAME} lacks a step, its files, or {INDEX_NAME} among them")


def _record(path: Path, name: str, value: object) -> FileRecord:
    match value:
        case {"size": int(size), "sha256": str(sha256)} if plain_name(name, folders=True):
            return FileRecord(size, sha256)
    raise _incomplete(path, f"{MANIFEST_NAME}: bad entry {name!r}")


def _incomplete(path: Path, why: str) -> DamagedError:
    return DamagedError(f"not a complete checkpoint: {path}: {why}; use another checkpoint")
