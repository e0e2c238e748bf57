"""What the processes of a run have to have in common, and whether they do.

`meet` compares it before `gptdist train` does anything else; `gptdist doctor --distributed` shows it, with the clocks
and the rates between the ranks (doctor_distributed.py). The facts of a rank are values that JSON has.
"""

import functools
import hashlib
import importlib.metadata
import os
import platform
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from gptdist import __version__
from gptdist.config import Config, ParallelConfig, to_dict
from gptdist.data.format import META_NAME, TokenDataset
from gptdist.data.shares import check_world
from gptdist.errors import EXIT_USER, ActionableError, MissingError, UserError
from gptdist.parallel.meeting import roll_call
from gptdist.parallel.world import choose_device, env_local_world_size, env_rank, env_world_size

PACKAGE = Path(__file__).resolve().parent
# What may differ between hosts: where the files lie, of which the content is compared, and what changes no result.
LOCAL = {"data.path", "data.input", "task.train_data", "task.val_data", "task.test_data", "parallel.deepspeed_config",
         "parallel.threads"}
FILES = ("task.train_data", "task.val_data", "task.test_data", "parallel.deepspeed_config")
FINGERPRINT_BYTES = 1 << 20  # of each end of a file
SAME_EVERYWHERE = {  # name in the facts -> what to do where it differs
    "gptdist": "install the same version on every node",
    "code": "give every node the same files of the package",
    "python": "use the same Python on every node",
    "torch": "install the same version on every node",
    "deepspeed": "install the same version on every node",
    "cuda": "install the same build of torch on every node",
    "nccl": "install the same build of torch on every node",
    "device type": "set parallel.device, and see `gptdist doctor` on the node without a GPU",
    "GPTDIST_OPS": "set it to the same on every node",
    "replicas of hsdp": "set parallel.replicas, for the nodes do not have equally many processes",
}

Facts = dict[str, Any]


@functools.cache
def code_hash() -> str:
    """sha256 over the names and contents of this package's Python files."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def facts_of(config: Config | None, fault: ActionableError | None = None, *, thorough: bool = False) -> Facts:
    """What this rank says of itself. fault: why it has no configuration.

    thorough: look at every shard of the data, and not at what identifies it alone.
    """
    try:
        device = choose_device((config.parallel if config else ParallelConfig()).device)
    except MissingError as error:
        device, fault = torch.device("cpu"), fault or error
    on_gpu = device.type == "cuda"
    return {
        "rank": env_rank(),
        "host": socket.gethostname(),
        "device": f"{device} {torch.cuda.get_device_name(device)}" if on_gpu else f"cpu {platform.machine()}",
        "same": {
            "gptdist": __version__,
            "code": code_hash(),
            "python": ".".join(platform.python_version_tuple()[:2]),
            "torch": torch.__version__,
            "deepspeed": package_version("deepspeed"),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
            "device type": device.type,
            "GPTDIST_OPS": os.environ.get("GPTDIST_OPS", ""),
            "replicas of hsdp": replicas(config.parallel) if config else None,
        },
        "config": comparable(config) if config else None,
        "data": data_facts(config, thorough=thorough) if config else {},
        "fault": [type(fault).__name__, str(fault)] if fault else None,
    }


def replicas(config: ParallelConfig) -> int | None:
    """Under hsdp, as many as this rank takes there to be nodes where the configuration does not say it."""
    if config.strategy != "hsdp":
        return None
    return config.replicas or env_world_size() // env_local_world_size()


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def comparable(config: Config) -> dict[str, Any]:
    """section.key -> value of all that every rank has to have the same."""
    values = {f"{section}.{key}": value for section, fields in to_dict(config).items() for key, value in fields.items()
              if f"{section}.{key}" not in LOCAL}
    for key in ("data.mixture", "data.validation"):
        values[key] = [{name: value for name, value in entry.items() if name != "path"} for entry in values[key]]
    return values


def data_facts(config: Config, *, thorough: bool) -> dict[str, list[str]]:
    """What the data is called -> [what identifies it here, ""] or ["", why it cannot be read here]."""
    found: dict[str, list[str]] = {}
    if not config.is_finetuning and not config.data.input:  # an input is prepared once the ranks have met
        entries = [("data.path", config.data.path)] if config.data.path else []
        entries += [(f"data.mixture[{i}]", entry["path"]) for i, entry in enumerate(config.data.mixture)]
        entries += [(f"data.validation[{i}]", entry["path"]) for i, entry in enumerate(config.data.validation)]
        for name, path in entries:
            found[f"{name}={path}"] = _attempt(lambda path=path: dataset_identity(Path(path), thorough=thorough))
    for name in FILES:
        section, _, key = name.partition(".")
        if path := getattr(getattr(config, section), key):
            found[f"{name}={path}"] = _attempt(lambda path=path: file_identity(Path(path)))
    return found


def _attempt(identify: Callable[[], str]) -> list[str]:
    try:
        return [identify(), ""]
    except OSError as error:
        return ["", f"{error.filename}: {error.strerror}"]
    except UserError as error:
        return ["", str(error)]


def dataset_identity(path: Path, *, thorough: bool) -> str:
    """Of a prepared dataset: by its meta.json, which has the size and sha256 of every shard, and its tokenizer.json.

    thorough: also open both splits, which compares the sizes of all files. Raises UserError or OSError naming the file.
    """
    splits = ["train", *(["val"] if (path / "val").is_dir() else [])]
    parts = [f"{split} {_short((path / split / META_NAME).read_bytes())}" for split in splits]
    parts.append(f"tokenizer {_short((path / 'tokenizer' / 'tokenizer.json').read_bytes())}")
    if thorough:
        metas = [TokenDataset.open(path / split).meta for split in splits]
        n_shards = sum(len(meta.shards) for meta in metas)
        parts.append(f"{sum(meta.n_tokens for meta in metas):,} tokens in {n_shards} shards")
    return ", ".join(parts)


def file_identity(path: Path) -> str:
    """Of a file: its size and the sha256 of its two ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(FINGERPRINT_BYTES)
        file.seek(max(len(start), size - FINGERPRINT_BYTES))
        return f"{size:,} bytes, {_short(start + file.read(FINGERPRINT_BYTES))}"


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


# What is different


def differences(everyone: list[Facts]) -> list[str]:
    """One line for each thing that is not the same on all ranks: the rank, its host, both values, what to do."""
    found = [line for name, advice in SAME_EVERYWHERE.items()
             if (line := _difference(name, [facts["same"][name] for facts in everyone], everyone, advice))]
    with_config = [facts for facts in everyone if facts["config"] is not None]
    for name in sorted({key for facts in with_config for key in facts["config"]}):
        if line := _difference(name, [facts["config"].get(name) for facts in with_config], with_config,
                               "start every rank with the same configuration"):
            found.append(line)
    return found + _data_differences(with_config)


def _difference(name: str, values: list[Any], everyone: list[Facts], advice: str) -> str | None:
    """The first rank whose value is not rank 0's."""
    others = [i for i, value in enumerate(values) if value != values[0]]
    if not others:
        return None
    more = f" ({len(others)} ranks differ)" if len(others) > 1 else ""
    return (f"{name} is {_shown(values[others[0]])} for {who(everyone[others[0]])}, {_shown(values[0])} for "
            f"{who(everyone[0])}{more}: {advice}")


def _data_differences(everyone: list[Facts]) -> list[str]:
    """Data is compared by its place in the configuration, wherever it lies. What no rank can read is not a difference:
    whoever opens it says more."""
    found = []
    for one in zip(*(facts["data"].items() for facts in everyone), strict=False):
        names, states = [name for name, _ in one], [state for _, state in one]
        good = [i for i, (identity, _) in enumerate(states) if identity]
        bad = [i for i, (identity, _) in enumerate(states) if not identity]
        if good and bad:
            found.append(f"{who(everyone[bad[0]])} cannot read {names[bad[0]]} ({states[bad[0]][1]}), which "
                         f"{who(everyone[good[0]])} can{_count(bad)}: put the data where every node sees it")
        elif good and (other := [i for i in good if states[i][0] != states[good[0]][0]]):
            found.append(f"{names[other[0]]} is {states[other[0]][0]} for {who(everyone[other[0]])}, "
                         f"{states[good[0]][0]} for {who(everyone[good[0]])}{_count(other)}: give every node the same "
                         f"files")
    return found


def _count(ranks: list[int]) -> str:
    return f" ({len(ranks)} ranks such)" if len(ranks) > 1 else ""


def who(facts: Facts) -> str:
    return f"rank {facts['rank']} on {facts['host']}"


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    text = str(value)
    return text[:12] if len(text) == 64 else text[:100]


def faults_of(everyone: Iterable[Facts]) -> list[tuple[Facts, str, str]]:
    """(facts, kind, text) of the ranks that say they cannot begin."""
    return [(facts, *facts["fault"]) for facts in everyone if facts["fault"]]


# Before training


def judge_start(everyone: list[Facts]) -> list[Any] | None:
    """[exit code, message, whether every rank has this fault by itself]; None: they may begin."""
    if faults := faults_of(everyone):
        facts, kind, text = faults[0]
        code = MissingError.exit_code if kind == MissingError.__name__ else EXIT_USER
        if len(faults) == len(everyone) and all(fault[1:] == (kind, text) for fault in faults):
            return [code, text, True]
        return [code, f"{who(facts)}: {text}", False]
    if found := differences(everyone):
        more = f" (and {len(found) - 1} more differences: see `gptdist doctor --distributed`)" if found[1:] else ""
        return [EXIT_USER, f"{found[0]}{more}", False]
    return None


def meet(config: Config | None, fault: ActionableError | None) -> None:
    """Wait for all ranks and compare what they are. fault: why this one has no configuration.

    Raises UserError or MissingError on every rank, the same, where one cannot begin or is not like the others.
    """
    if fault is not None and (env_world_size() == 1 or "MASTER_ADDR" not in os.environ):
        fault.agreed = True  # there is nowhere to meet: each rank has to take it that the others find it too
        raise fault
    if env_world_size() == 1:
        return
    timeout_s = (config.parallel if config else ParallelConfig()).timeout_s
    judgement = roll_call(facts_of(config, fault), judge_start, rank=env_rank(), size=env_world_size(),
                          timeout_s=timeout_s)
    if judgement is not None:
        code, message, agreed = judgement
        raise (MissingError if code == MissingError.exit_code else UserError)(message, agreed=agreed)


def check_batch(config: Config, size: int) -> None:
    """Raise UserError where `size` processes have no sequence each."""
    check_world(config.sequences_per_step, max(1, size // config.parallel.tensor))
