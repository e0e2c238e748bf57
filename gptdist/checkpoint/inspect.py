"""What a checkpoint holds, for people: `gptdist inspect`."""

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gptdist.checkpoint import layout, store
from gptdist.checkpoint.base import base_of
from gptdist.checkpoint.restore import read_config
from gptdist.config import to_dict


def describe(path: str, which: str = "latest", *, verify: bool = False) -> dict:
    """Step, progress, sizes, configuration and tensors of a checkpoint (or of a run's), as plain values."""
    checkpoint = layout.resolve(path, which)
    if verify:
        layout.verify(checkpoint)
    manifest, index = layout.complete(checkpoint), store.read_index(checkpoint)
    weights = {key: shape for key, (shape, _) in index.items() if key.startswith("model.")}
    return {
        "checkpoint": str(checkpoint),
        "verified": verify,
        "parameters": sum(math.prod(shape) for shape in weights.values()),
        "bytes": sum(record.size for record in manifest.files.values()),
        "files": {name: record.size for name, record in manifest.files.items()},
        "train_state": layout.read_train_state(checkpoint),
        "config": to_dict(read_config(checkpoint)),
        "tensors": {key: {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
                    for key, (shape, dtype) in index.items()},
        "base": str(base) if (base := base_of(checkpoint)) else None,
        "others": [p.name for p in layout.scan(Path(checkpoint).parent)[0]],
    }


def _adapters(found: dict) -> dict[str, str]:
    """The line about adapters, where there are some."""
    options, base = found["config"]["lora"], found["base"]
    if not options["rank"]:
        return {}
    where = f"alone, their base is {base}" if base else "beside their base"
    return {"adapters": f"rank {options['rank']}, alpha {options['alpha']:g}, of {options['targets']}; {where}"}


def print_description(found: dict, *, tensors: bool) -> None:
    console = Console(soft_wrap=True, highlight=False)
    model, state = found["config"]["model"], found["train_state"]
    rows = {
        "checkpoint": found["checkpoint"],
        "checksums": "all correct" if found["verified"] else "not checked (--verify checks them)",
        "step": f"{state.get('step')} of {found['config']['train']['steps']}, {state.get('tokens', 0):,} tokens seen",
        "validation loss": f"{state.get('val_loss')} (best so far: {state.get('best_val_loss')})",
        "parameters": f"{found['parameters']:,}",
        **_adapters(found),
        "model": f"{model['n_layers']} layers, width {model['width']}, {model['n_heads']} heads, context "
                 f"{model['context']}, vocabulary {model['vocab_size']}, {'tied' if model['tied'] else 'untied'} head",
        "size": f"{found['bytes'] / 1e6:.1f} MB in {len(found['files'])} files, {len(found['tensors'])} tensors",
        "complete here": ", ".join(found["others"]),
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if tensors:
        table = Table("tensor", "shape", "dtype", box=None)
        for key, tensor in found["tensors"].items():
            table.add_row(key, str(tuple(tensor["shape"])), tensor["dtype"])
        console.print(table)
