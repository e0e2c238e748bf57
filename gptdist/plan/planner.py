"""A configuration on a number of devices: its Plan, and others that fit and cost less."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gptdist.config import Config
from gptdist.errors import UserError
from gptdist.plan.devices import Device
from gptdist.plan.memory import Memory, memory_of
from gptdist.plan.shapes import Layout, Parameters, Step, flops_of, lay_out, step_of, strategy_of
from gptdist.plan.speed import StepTime, Traffic, step_time, traffic_of

DAY_S = 86400


@dataclass(frozen=True)
class Plan:
    """What one configuration needs on one set of devices. Its numbers are in bytes, seconds and FLOPs."""

    config: Config  # with its precision and vocabulary resolved
    layout: Layout
    step: Step
    device: Device
    price: float | None = None  # of a device and hour
    auto_precision: bool = False  # train.precision was auto

    @property
    def strategy(self) -> str:
        return strategy_of(self.config, self.layout.size)

    @cached_property
    def parameters(self) -> int:
        return Parameters(self.config.model).total

    @cached_property
    def memory(self) -> Memory:
        return memory_of(self.config, self.layout, self.step, self.device)

    @cached_property
    def traffic(self) -> Traffic:
        return traffic_of(self.config, self.layout, self.step)

    @cached_property
    def time(self) -> StepTime | None:
        """None where the device's rates are not known."""
        return step_time(self.config, self.layout, self.step, self.device)

    @property
    def flops(self) -> float:
        """Model FLOPs of a step over all devices."""
        return flops_of(self.config).model * self.step.target_tokens

    @property
    def mfu(self) -> float | None:
        peak = self.device.peak(self.config.train.precision)
        return None if self.time is None else self.flops / (self.time.total * peak * self.layout.size)

    @property
    def tokens_per_s(self) -> float | None:
        return None if self.time is None else self.step.target_tokens / self.time.total

    def cost(self, tokens: float | None) -> float | None:
        """Of training on so many tokens, in the price's currency."""
        if tokens is None or self.price is None or self.tokens_per_s is None:
            return None
        return tokens / self.tokens_per_s / 3600 * self.layout.size * self.price

    @property
    def run_tokens(self) -> int | None:
        """Of the whole run that the configuration describes (train.steps); None where the data decides: epochs."""
        if self.config.train.epochs or any("epochs" in entry for entry in self.config.data.mixture):
            return None
        return self.config.train.steps * self.step.target_tokens


def make_plan(config: Config, world_size: int, device: Device, *, per_node: int = 8,
              price: float | None = None) -> Plan:
    """Plan a run. Raises UserError for processes, batches or prices that cannot be."""
    if price is not None and not 0 <= price < float("inf"):
        raise UserError(f"--price is {price:g}, expected 0 or more")
    auto, config = config.train.precision == "auto", _resolved(config, device)
    layout = lay_out(config, world_size, per_node)
    return Plan(config, layout, step_of(config, layout), device, price, auto)


def _resolved(config: Config, device: Device) -> Config:
    """The configuration with its precision, vocabulary and fine-tuning windows decided."""
    # All GPUs of the table multiply bf16. Of a CPU that is not known here: most do not, and a run on one takes fp32.
    train, model = config.train.resolved(device.kind == "cuda"), config.model
    if model.vocab_size is None:
        paths = [config.data.path, *(entry["path"] for entry in config.data.mixture)]
        model = dataclasses.replace(model, vocab_size=_vocabulary(next(filter(None, paths), "")))
    return dataclasses.replace(config, train=train, model=model)


def _vocabulary(path: str) -> int:
    from gptdist.data.tokenizer import Tokenizer

    folder = Path(path) / "tokenizer"
    if not path or not folder.is_dir():
        raise UserError(f"model.vocab_size is null and data.path={path or 'null'} has no tokenizer to take it from: "
                        f"set it, --model.vocab_size=50257 for GPT-2's")
    return Tokenizer.load(folder).vocab_size


def suggest(plan: Plan) -> list[Plan]:
    """Plans of the same model, step and devices that fit, fastest first: the best of each strategy.

    Without rates that give a time, those that recompute less, need fewer micro-batches and hold less come first.
    """
    best: dict[str, Plan] = {}
    for other in sorted(_alternatives(plan), key=_rank):  # memory is known for no more of them than it takes
        if _name(other) not in best and other.memory.fits:
            best[_name(other)] = other
    return sorted(best.values(), key=lambda found: (*_rank(found), found.memory.total))


def _name(plan: Plan) -> str:
    return plan.strategy + ("+offload" if plan.config.parallel.offload_optimizer else "")


def _rank(plan: Plan) -> tuple[float, ...]:
    if plan.time is not None:
        return (plan.time.total,)
    return plan.config.train.checkpoint_every_block > 0, plan.step.count


def _alternatives(plan: Plan) -> Iterator[Plan]:
    config, layout = plan.config, plan.layout
    strategies = ["single"] if layout.size == 1 else ["ddp", "fsdp", "zero1", "zero2", "zero3"]
    if layout.nodes > 1:
        strategies.append("hsdp")  # on one node it is fsdp
    offloads = {"zero2": (False, True), "zero3": (False, True)}
    share = -(-config.sequences_per_step // layout.dp_size) * layout.tensor
    micro_batches = [2**i for i in range(max(1, share).bit_length())]
    for strategy, micro_batch, recompute in itertools.product(strategies, micro_batches, ("none", "full")):
        tensors = (1, 2, 4, 8) if strategy in ("fsdp", "hsdp") else (1,)
        for tensor, offload in itertools.product(tensors, offloads.get(strategy, (False,))):
            if tensor > min(layout.per_node, layout.size):
                continue
            parallel = dataclasses.replace(config.parallel, strategy=strategy, tensor=tensor, replicas=0,
                                           offload_optimizer=offload, offload_parameters=False, offload_adam="torch",
                                           deepspeed_config=None)
            train = dataclasses.replace(config.train, micro_batch=micro_batch, activation_checkpointing=recompute)
            try:
                other = dataclasses.replace(config, parallel=parallel, train=train)
                yield make_plan(other, layout.size, plan.device, per_node=layout.per_node, price=plan.price)
            except UserError:  # a combination that the model or the world cannot be divided into
                continue
