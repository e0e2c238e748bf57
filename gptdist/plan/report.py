"""A Plan as text and as JSON."""

from typing import Any

from gptdist.plan.memory import MEASURED, NOT_MEASURED
from gptdist.plan.planner import DAY_S, Plan, suggest

GB = 1e9
SUGGESTED = 5


def to_dict(plan: Plan, suggestions: list[Plan]) -> dict[str, Any]:
    """For --json: bytes, seconds, FLOPs."""
    time = plan.time
    return {
        "parameters": plan.parameters, "strategy": plan.strategy, "world_size": plan.layout.size,
        "tensor": plan.layout.tensor, "replicas": plan.layout.replicas, "shards": plan.layout.shards,
        "device": plan.device.name, "precision": plan.config.train.precision, "micro_batches": plan.step.count,
        "micro_batch": plan.step.rows, "tokens_per_step": plan.step.target_tokens,
        "memory": {**plan.memory.parts, "total": plan.memory.total, "capacity": plan.memory.capacity,
                   "fits": plan.memory.fits, "measured": plan.memory.measured},
        "communication": [{"name": c.name, "bytes_sent": c.sent * n, "collectives": c.times * n}
                          for c, n in plan.traffic.all(plan.step.count)],
        "flops_per_step": plan.flops,
        "time": None if time is None else {**vars(time), "total": time.total},
        "mfu": plan.mfu, "tokens_per_s": plan.tokens_per_s,
        "tokens_per_day": None if time is None else plan.tokens_per_s * DAY_S,
        "run_tokens": plan.run_tokens, "run_cost": plan.cost(plan.run_tokens),
        "suggestions": [_suggestion(other) for other in suggestions],
    }


def _suggestion(plan: Plan) -> dict[str, Any]:
    return {"overrides": _overrides(plan), "memory": plan.memory.total, "tokens_per_s": plan.tokens_per_s,
            "mfu": plan.mfu, "cost_per_billion_tokens": plan.cost(1e9)}


def _overrides(plan: Plan) -> list[str]:
    parallel, train = plan.config.parallel, plan.config.train
    chosen = [f"--parallel.strategy={parallel.strategy}", f"--train.micro_batch={train.micro_batch}",
              f"--train.activation_checkpointing={train.activation_checkpointing}"]
    if parallel.tensor > 1:
        chosen.append(f"--parallel.tensor={parallel.tensor}")
    if plan.strategy == "hsdp":
        chosen.append(f"--parallel.replicas={plan.layout.replicas}")
    return chosen + ["--parallel.offload_optimizer=true"] * parallel.offload_optimizer


def to_text(plan: Plan, suggestions: list[Plan]) -> str:
    return "\n".join([*_heading(plan), "", *_memory(plan), "", *_communication(plan), "", *_time(plan), "",
                      *_suggested(suggestions)])


def _heading(plan: Plan) -> list[str]:
    layout, step = plan.layout, plan.step
    tensor = f" x tensor parallel {layout.tensor}" if layout.tensor > 1 else ""
    nodes = f"{layout.nodes} node{'s' if layout.nodes > 1 else ''}"
    return [f"{_count(plan.parameters)} parameters; {plan.strategy}{tensor} on {layout.size} x {plan.device.name} "
            f"({nodes}), {_precision(plan)}",
            f"{step.sequences} x {step.context} tokens a step: {step.count} micro-batch{'es' * (step.count > 1)} of "
            f"{step.rows} on each of {layout.dp_size} data-parallel ranks"]


def _precision(plan: Plan) -> str:
    found = plan.config.train.precision
    if not plan.auto_precision:
        return found
    if plan.device.kind == "cuda":
        return f"{found} (train.precision=auto)"
    return f"{found} (train.precision=auto; on a processor that multiplies bf16 it is bf16: plan with precision=bf16)"


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    rows = [f"  {name:14} {size / GB:8.2f}" for name, size in memory.parts.items() if size > 0]
    verdict = "fits" if memory.fits else "does not fit"
    by = "of a kind that was measured" if memory.measured else "by a formula that was not measured"
    return ["memory of a rank, GB", *rows,
            f"  {'total':14} {memory.total / GB:8.2f}  of {memory.capacity / GB:g}: {verdict}, {by}",
            f"  measured: {MEASURED}", f"  not measured: {NOT_MEASURED}"]


def _communication(plan: Plan) -> list[str]:
    found = [(c, n) for c, n in plan.traffic.all(plan.step.count) if c.sent > 0]
    if not found:
        return ["communication: none"]
    return ["communication of a rank and step, GB sent",
            *(f"  {c.name:24} {c.sent * n / GB:10.2f}  in {c.times * n:,} collectives over {c.ranks} ranks"
              for c, n in found)]


def _time(plan: Plan) -> list[str]:
    time = plan.time
    if time is None:
        return [f"time: not known without the device's rates (--peak-tflops); {plan.flops / 1e12:,.1f} TFLOP a step"]
    parts = {"matrix products": time.products, "attention": time.attention, "other kernels": time.memory,
             "optimizer": time.optimizer, "exposed comm.": time.exposed}
    lines = ["time of a step, s", *(f"  {name:15} {value:9.4f}" for name, value in parts.items()),
             f"  {'total':15} {time.total:9.4f}  ({time.communication:.4f} of communication, "
             f"{plan.flops / 1e12:,.1f} TFLOP)",
             f"{plan.tokens_per_s:,.0f} tokens/s, {plan.tokens_per_s * DAY_S / 1e9:,.2f} billion a day, MFU "
             f"{plan.mfu:.1%}"]
    if plan.run_tokens is None:
        return [*lines, "the run's tokens, days and cost: not known, epochs are of data that is not read here"]
    days = plan.run_tokens / plan.tokens_per_s / DAY_S
    cost = plan.cost(plan.run_tokens)
    money = "" if cost is None else f", {cost:,.0f} at {plan.price:g} per device and hour"
    return [*lines, f"the run's {plan.run_tokens / 1e9:,.2f} billion tokens: {days:,.2f} days{money}"]


def _suggested(suggestions: list[Plan]) -> list[str]:
    if not suggestions:
        return ["nothing fits: use more or larger devices, or parallel.tensor with another number of heads"]
    lines = ["cheapest that fit, best of each strategy"]
    for other in suggestions[:SUGGESTED]:
        speed = "" if other.time is None else f"{other.tokens_per_s:12,.0f} tokens/s "
        cost = "" if other.cost(1e9) is None else f"{other.cost(1e9):9.2f} per billion tokens "
        lines.append(f"  {other.memory.total / GB:7.1f} GB {speed}{cost} {' '.join(_overrides(other))}")
    return lines


def _count(n: int) -> str:
    return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.2f}M"


def run(plan: Plan, *, json: bool) -> str:
    """What the command prints."""
    suggestions = suggest(plan)
    if json:
        import json as json_module

        return json_module.dumps(to_dict(plan, suggestions), indent=1)
    return to_text(plan, suggestions)
