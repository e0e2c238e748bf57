"""One sharded checkpoint format: safetensors shards, an index, a manifest; saved and loaded at any world size."""

from gptdist.checkpoint.layout import (
    Manifest,
    best,
    clean_stale,
    complete,
    latest,
    prune,
    read_file,
    read_train_state,
    resolve,
    scan,
    set_aside,
    verify,
)
from gptdist.checkpoint.store import load, load_tensors, read_index, save, verify_together

__all__ = [
    "Manifest",
    "best",
    "clean_stale",
    "complete",
    "latest",
    "load",
    "load_tensors",
    "prune",
    "read_file",
    "read_index",
    "read_train_state",
    "resolve",
    "save",
    "scan",
    "set_aside",
    "verify",
    "verify_together",
]
