"""DeepSpeed's JSON, derived from the configuration: what both say is said once, in the YAML.

A user's own JSON (parallel.deepspeed_config) is laid over the derived one: it may add anything (bucket sizes, overlap,
ZeRO++ ...) and repeat what the YAML says, literally or as "auto"; where the two contradict each other is an error.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptdist.config import Config
from gptdist.data.shares import check_world, micro_batches_per_step
from gptdist.errors import UserError

# Elements of a gradient reduction. DeepSpeed's default, 5e8, is a buffer of 2 GB.
REDUCE_BUCKET_SIZE = 50_000_000
AUTO = "auto"  # Hugging Face's word for "as the program says"

# Derived entry -> the YAML's name for it, for the error when a user's JSON says otherwise.
YAML_NAMES = {
    "train_batch_size": "train.tokens_per_step / model.context, rounded up to whole micro-batches",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.tokens_per_step / model.context / (processes x train.micro_batch)",
    "gradient_clipping": "train.grad_clip",
    "zero_allow_untested_optimizer": "our optimizer",
    "zero_force_ds_cpu_optimizer": "parallel.offload_adam",
    "zero_optimization.stage": "parallel.strategy",
    "zero_optimization.offload_optimizer.device": "parallel.offload_optimizer",
    "zero_optimization.offload_param.device": "parallel.offload_parameters",
    "zero_optimization.memory_efficient_linear": "(it would replace torch's linear in the whole process)",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "communication_data_type": "(gradients are reduced in fp32)",
    "data_types.grad_accum_dtype": "(gradients are accumulated in fp32)",
    "torch_autocast.enabled": "train.precision",
    "amp.enabled": "train.precision",
}
# What DeepSpeed takes for these where, as here, the JSON says nothing.
DEFAULTS = {"zero_optimization.offload_param.device": "none", "torch_autocast.enabled": False, "amp.enabled": False}
# Top-level keys of DeepSpeed 0.19 and of the versions before; it ignores any other.
TOP_LEVEL = [
    "activation_checkpointing", "aio", "amp", "autotuning", "bf16", "bfloat16", "checkpoint", "comet",
    "comms_logger", "communication_data_type", "compile", "compression_training", "csv_monitor",
    "curriculum_learning", "data_efficiency", "data_types", "dataloader_drop_last", "datastates_ckpt",
    "disable_allgather", "disable_python_gc", "dump_state", "eigenvalue", "elasticity", "expert_parallel",
    "flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping",
    "gradient_predivide_factor", "graph_harvesting", "hybrid_engine", "log_level", "managed_gradient_accumulation",
    "memory_breakdown", "nebula", "optimizer", "pipeline", "prescale_gradients", "progressive_layer_drop",
    "quantize_training", "scheduler", "seq_parallel_communication_data_type", "sequence_parallel_size",
    "sparse_attention", "sparse_gradients", "steps_per_print", "tensor_parallel", "tensorboard", "timers",
    "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism",
    "vocabulary_size", "wall_clock_breakdown", "wandb", "weight_quantization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
]


def deepspeed_config(config: Config, world: int) -> dict[str, Any]:
    """The JSON of a run on `world` processes.

    The batch sizes count padding: shares that are not even run rows without targets. DeepSpeed only checks their
    product; the loss is divided by our count of targets.
    """
    count, rows = micro_batches_per_step(config.sequences_per_step, world, config.train.micro_batch)
    parallel = config.parallel
    stage = int(parallel.strategy.removeprefix("zero"))
    zero = {"stage": stage, "reduce_bucket_size": REDUCE_BUCKET_SIZE, "memory_efficient_linear": False,
            "offload_optimizer": _offload(parallel.offload_optimizer)}
    if stage == 3:
        zero["offload_param"] = _offload(parallel.offload_parameters)
    return {
        "train_batch_size": rows * count * world,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": count,
        "gradient_clipping": config.train.grad_clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "fp16": {"enabled": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def _offload(on: bool) -> dict[str, Any]:
    return {"device": "cpu", "pin_memory": True} if on else {"device": "none"}


def resolved_deepspeed_config(config: Config, world: int) -> dict[str, Any]:
    """deepspeed_config with the user's JSON laid over it. Raises UserError where the two contradict each other."""
    if not config.parallel.strategy.startswith("zero"):
        raise UserError(f"parallel.strategy={config.parallel.strategy} does not use DeepSpeed: "
                        f"choose zero1, zero2 or zero3")
    if world < 1:
        raise UserError(f"--processes is {world}, expected at least 1")
    check_world(config.sequences_per_step, world)
    derived, path = deepspeed_config(config, world), config.parallel.deepspeed_config
    if path is None:
        return derived
    own = _read_json(path)
    _check_optimizer(own.pop("optimizer", AUTO), config, path)
    if own.pop("scheduler", AUTO) != AUTO:
        raise UserError(f"{path} has a scheduler, but the learning rate is schedule.name={config.schedule.name}: "
                        f"remove it from the JSON")
    return _laid_over(derived, own, path)


def _read_json(path: str) -> dict[str, Any]:
    try:
        own = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read parallel.deepspeed_config={path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"parallel.deepspeed_config={path} is not valid JSON: {error}") from error
    if not isinstance(own, dict):
        raise UserError(f"parallel.deepspeed_config={path} holds a {type(own).__name__}, expected an object")
    return own


def _laid_over(derived: dict[str, Any], own: dict[str, Any], path: str) -> dict[str, Any]:
    known = DEFAULTS | dict(_leaves(derived))
    _check_keys(own, path)
    _check_sections(own, known, path)
    merged = json.loads(json.dumps(derived))
    for name, value in _leaves(own):
        if value == AUTO:
            if name not in known:
                raise UserError(f'{path} has {name}="auto", which nothing in the YAML decides: give a value')
            continue
        if name in YAML_NAMES and not _equal(value, known[name]):
            raise UserError(f"{path} has {name}={json.dumps(value)}, but the YAML says {json.dumps(known[name])}: "
                            f"{YAML_NAMES[name]}; make them equal, or remove it from the JSON")
        *sections, last = name.split(".")
        place = merged
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return merged


def _check_keys(own: Mapping[str, Any], path: str) -> None:
    for key in own:
        if key not in TOP_LEVEL:
            close = difflib.get_close_matches(key, TOP_LEVEL, n=1)
            advice = f"did you mean {close[0]!r}?" if close else "remove it"
            raise UserError(f"{path} has {key!r}, which DeepSpeed does not know and would ignore; {advice}")


def _check_sections(own: Mapping[str, Any], known: Mapping[str, Any], path: str, prefix: str = "") -> None:
    """Raise UserError for a value in place of a section of `known`, which it would replace, and the reverse."""
    for key, value in own.items():
        name = prefix + key
        section = [other for other in known if other.startswith(f"{name}.")]
        if section and not isinstance(value, dict):
            inner = {section[0].removeprefix(f"{name}."): "..."}
            raise UserError(f"{path} has {name}={json.dumps(value)}, expected an object such as {json.dumps(inner)}")
        if name in known and isinstance(value, dict):
            raise UserError(f"{path} has {name}={json.dumps(value)}, expected a value such as "
                            f"{json.dumps(known[name])}")
        if isinstance(value, dict):
            _check_sections(value, known, path, f"{name}.")


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("section.key", value) of nested objects."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    numbers = isinstance(value, int | float) and isinstance(wanted, int | float)
    return abs(value - wanted) <= 1e-9 * abs(wanted) if numbers else value == wanted


def _check_optimizer(optimizer: Any, config: Config, path: str) -> None:
    """The optimizer is ours; a JSON that names one has to name the same."""
    if optimizer == AUTO:
        return
    optim = config.optim
    wanted = {"type": "AdamW", "params.lr": optim.lr, "params.betas": [optim.beta1, optim.beta2],
              "params.eps": optim.eps, "params.weight_decay": optim.weight_decay}
    for name, value in _leaves(optimizer if isinstance(optimizer, dict) else {"type": optimizer}):
        if value == AUTO:
            continue
        if name not in wanted or not _equal(value, wanted[name]):
            says = json.dumps(wanted[name]) if name in wanted else "no such option"
            raise UserError(f"{path} has optimizer.{name}={json.dumps(value)}, but the YAML says {says}: section "
                            f"optim; make them equal, or remove it from the JSON")
