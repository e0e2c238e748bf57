"""ZeRO stages 1, 2 and 3 on DeepSpeed's engine, behind the protocol of strategies.py.

DeepSpeed keeps fp32 master weights and optimizer slots in flat partitions, one per parameter group, and a working copy
of the parameters in the compute precision. Three things are ours: the masters are filled from model.initial_values, a
piece at a time; a checkpoint sees every partition as FlatShards, so nothing is gathered; and the loss is divided by the
global count of targets before DeepSpeed averages over ranks (its own division by the micro-batches is off).

    stage 1  optimizer state and masters are partitioned
    stage 2  gradients too
    stage 3  parameters too: gathered module by module around their use

Source: Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter models" (2020).
"""

import contextlib
import copy
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptdist import ops
from gptdist.config import Config
from gptdist.errors import MissingError, UserError
from gptdist.model import initial_values
from gptdist.optim.adamw import MOMENTS, slots
from gptdist.parallel import init
from gptdist.parallel.deepspeed_config import resolved_deepspeed_config
from gptdist.parallel.flat_shard import FlatShard
from gptdist.parallel.strategies import OptimizerFactory, Strategy
from gptdist.parallel.world import World


def import_deepspeed(strategy: str, device: torch.device) -> ModuleType:
    """DeepSpeed, set up for this device. Raises MissingError where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # a single process without a launcher
    try:
        import deepspeed
    except ImportError as error:
        raise MissingError(f"parallel.strategy={strategy} needs DeepSpeed ({error}): "
                           f"pip install --no-build-isolation deepspeed, or use parallel.strategy=fsdp") from error
    if device.type == "cpu":
        # Its shared-memory collectives would be compiled now, for half a minute; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Names that it still uses and newer torch warns about, at every call.
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    deepspeed.init_distributed(verbose=False)  # takes over the process group that is already there
    return deepspeed


def check_json(values: dict, path: str) -> None:
    """Raise UserError naming the user's file if DeepSpeed's own reading of the JSON fails, in whatever way."""
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(copy.deepcopy(values))
    except Exception as error:
        why = " ".join(str(error).partition("For further information")[0].split())[:400]
        raise UserError(f"parallel.deepspeed_config={path} is refused by DeepSpeed: {type(error).__name__}: {why}"
                        ) from error


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that this rank's partitions hold: `numel` elements from `start` of its row-major order,
    at `offset` of flat partition number `flat`."""

    flat: int
    offset: int
    start: int
    numel: int


class ZeRO(Strategy):
    """DeepSpeed's ZeRO, stage 1, 2 or 3, with optional offload to host memory."""

    def __init__(self, world: World, config: Config):
        super().__init__(world, config)
        self.stage = int(world.strategy.removeprefix("zero"))
        self.json = resolved_deepspeed_config(self.config, world.size)
        self.deepspeed = import_deepspeed(world.strategy, world.device)
        if config.parallel.deepspeed_config is not None:
            check_json(self.json, config.parallel.deepspeed_config)

    # Preparation

    def prepare(self, model: nn.Module, optimizer_factory: OptimizerFactory | None) -> None:
        assert optimizer_factory is not None, "ZeRO shards an optimizer"
        self._configure(model)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        model.to(torch.bfloat16 if self.config.train.precision == "bf16" else torch.float32)
        optimizer = self._materialise(model, optimizer_factory)
        with contextlib.redirect_stdout(io.StringIO()):  # its tables of memory in use; warnings go another way
            self.engine = self.deepspeed.initialize(model=model, optimizer=optimizer, config=self.json)[0]
        self.model, self.zero = model, self.engine.optimizer
        self.optimizer = self.zero.optimizer  # steps the flat partitions
        self.parameters = dict(model.named_parameters())
        self.pieces = dict(self._find_pieces())
        self._steps: dict[int, Tensor] = {}
        self._fill_initial_values()

    def _materialise(self, model: nn.Module, optimizer_factory: OptimizerFactory) -> torch.optim.Optimizer:
        """Give the meta model uninitialised memory and its optimizer; at stage 3 no more than a block at a time."""
        if self.stage < 3:
            model.to_empty(device=self.world.device)
            return self._optimizer(model, optimizer_factory)
        # The optimizer groups parameters by their dimensions, which partitioning takes away: it comes first, and sees
        # parameters of full shape without memory.
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                thin = torch.zeros((), dtype=p.dtype, device=self.world.device).expand(p.shape)
                setattr(module, name, nn.Parameter(thin, requires_grad=p.requires_grad))
        optimizer = self._optimizer(model, optimizer_factory)
        rest = [child for child in model.children() if child is not model.blocks]
        for part in [*model.blocks, *rest]:
            for p in part.parameters():
                p.data = torch.empty(p.shape, dtype=p.dtype, device=self.world.device)
            self.deepspeed.zero.Init(module=part, config_dict_or_path=self.json)
        return optimizer

    def _optimizer(self, model: nn.Module, optimizer_factory: OptimizerFactory) -> torch.optim.Optimizer:
        optimizer = optimizer_factory([(name, p) for name, p in model.named_parameters() if p.requires_grad])
        if self.config.parallel.offload_adam == "torch":
            return optimizer
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        groups = [dict(params=group["params"], weight_decay=group["weight_decay"]) for group in optimizer.param_groups]
        common = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps")}
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **common)

    def _find_pieces(self) -> Iterator[tuple[str, Piece]]:
        """Which trainable parameters this rank's partitions hold, and where."""
        if self.stage < 3:
            for name, p in self.parameters.items():
                part = p._hp_mapping if p.requires_grad else None
                if part is not None:
                    whole, flat = part.lp_fragment_address, part.hp_fragment_address
                    yield name, Piece(part.param_group_index, flat.start, whole.start, flat.numel)
            return
        names = {id(p): name for name, p in self.parameters.items()}
        for i, group in enumerate(self.zero.fp16_groups):
            offset = 0
            for p in group:
                yield names[id(p)], Piece(i, offset, *_partition(p))
                offset += p.partition_numel()

    def _fill_initial_values(self) -> None:
        n_layers, seed = len(self.model.blocks), self.config.run.seed
        for key, tensor in self.model_state().items():
            name = key.removeprefix("model.")
            flat, start = (tensor.flat, tensor.start) if isinstance(tensor, FlatShard) else (tensor.view(-1), 0)
            for i, values in enumerate(flat.split(init.BUFFER_VALUES)):
                values.copy_(initial_values(name, self.shapes[name], start + i * init.BUFFER_VALUES, values.numel(),
                                            n_layers=n_layers, seed=seed))
        self.loaded()

    # A step

    def _forward_module(self) -> nn.Module:
        return self.engine

    def _compute(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # the parameters have the compute precision

    def micro_batch(self, is_last: bool) -> contextlib.AbstractContextManager:
        self.engine.set_gradient_accumulation_boundary(is_last)
        return contextlib.nullcontext()

    def backward(self, loss_sum: Tensor, n_targets: int) -> None:
        # DeepSpeed averages over ranks, where the sum is wanted.
        self.engine.backward(loss_sum * (self.world.size / max(n_targets, 1)), scale_wrt_gas=False)

    def grad_norm(self) -> Tensor:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # DeepSpeed reduces and offloads on streams of its own
        squared = ops.grad_norm(self._gradients()).to(self.world.device).double() ** 2
        dist.all_reduce(squared)
        self._norm = squared.sqrt().float()
        return self._norm

    def _gradients(self) -> list[Tensor]:
        """This rank's partitions of the averaged gradient."""
        return [gradient for group in self._gradients_by_flat().values() for gradient in group]

    def _gradients_by_flat(self) -> dict[int, list[Tensor]]:
        """The same by number of the flat partition, in pieces that follow one another."""
        if self._bf16_stage_1:
            return {i: [gradient] for i, gradient in enumerate(self.zero.fp32_groups_gradient_flat_partition)}
        if self.config.parallel.offload_optimizer:
            return {i: [flat.grad] for i, flat in enumerate(self._flats)}
        return dict(self.zero.averaged_gradients)

    def bad_gradients(self) -> list[str]:
        finite = {i: torch.cat([gradient.flatten().isfinite() for gradient in group])
                  for i, group in self._gradients_by_flat().items()}
        return [name for name, piece in self.pieces.items()
                if not finite[piece.flat][piece.offset:piece.offset + piece.numel].all()]

    def apply(self, lr: float, clip: float) -> None:
        assert self._norm is not None, "grad_norm() comes before apply()"
        self.zero.clip_grad = clip
        for group in self.zero.param_groups:
            group["lr"] = lr
        self.engine.step()
        assert self.engine.was_step_applied(), "DeepSpeed skipped a step whose gradient is finite"
        self._norm = None

    def discard(self) -> None:
        """Drop the accumulated gradient, as DeepSpeed does when it skips a step."""
        if self._bf16_stage_1:
            self.zero.clear_hp_grads()
            self.zero.clear_lp_grads()
        else:
            self.zero.zero_grad(set_to_none=True)
            self.zero.micro_step_id = -1 if self.stage < 3 else 0  # the next micro-batch is the first
            for attribute in ("averaged_gradients", "all_grad_tensors"):
                for i in getattr(self.zero, attribute, {}):
                    getattr(self.zero, attribute)[i] = None
            if self.config.parallel.offload_optimizer:
                self.zero.reset_cpu_buffers()
        self._norm = None

    # State

    @property
    def _bf16_stage_1(self) -> bool:
        """DeepSpeed has another optimizer for bf16 with fp32 gradients at stage 1."""
        return hasattr(self.zero, "fp32_groups_flat_partition")

    @property
    def _flats(self) -> list[Tensor]:
        """The flat fp32 partitions of this rank, one per parameter group (stage 3: per sub-group)."""
        if self._bf16_stage_1:
            return self.zero.fp32_groups_flat_partition
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def model_state(self) -> dict[str, Tensor]:
        """`model.<name>` -> this rank's part of the fp32 master weight. Frozen ones have only the working copy."""
        return {f"model.{name}": self._shard_of(name, self._flats) if p.requires_grad else self._frozen(name, p)
                for name, p in self.parameters.items()}

    def state(self) -> dict[str, Tensor]:
        by_flat = [self._slots(i) for i in range(len(self._flats))]
        values = self.model_state()
        for name, p in self.parameters.items():
            if p.requires_grad:
                values |= {f"optim.{name}.{slot}": self._shard_of(name, [flat[slot] for flat in by_flat])
                           for slot in MOMENTS}
                # Every partition has taken the same steps; a rank may have nothing of this parameter.
                values[f"optim.{name}.step"] = by_flat[self.pieces[name].flat if name in self.pieces else 0]["step"]
        return values

    def replicas(self) -> list[tuple[dist.ProcessGroup | None, dict[str, Tensor]]]:
        """Below stage 3 every rank has all working copies."""
        return [(None, {f"model.{name}": p.detach() for name, p in self.parameters.items()})] if self.stage < 3 else []

    def _shard_of(self, name: str, flats: list[Tensor]) -> FlatShard:
        piece = self.pieces.get(name)
        if piece is None:
            return FlatShard(flats[0].detach()[:0], 0, self.shapes[name])
        return FlatShard(flats[piece.flat].detach().narrow(0, piece.offset, piece.numel), piece.start,
                         self.shapes[name])

    def _frozen(self, name: str, p: nn.Parameter) -> Tensor:
        if self.stage < 3:
            return p.detach()
        start, numel = _partition(p)
        return FlatShard(p.ds_tensor.detach().narrow(0, 0, numel), start, self.shapes[name])

    def _slots(self, i: int) -> dict[str, Tensor]:
        flat = self._flats[i]
        if self.config.parallel.offload_adam == "torch":
            return slots(self.optimizer, flat)
        state = self.optimizer.state[flat]
        if not state:
            state.update(step=0, **{name: torch.zeros_like(flat) for name in MOMENTS})
        step = self._steps.setdefault(i, torch.zeros(()))  # CPUAdam counts in Python: loaded() writes it back
        return {"step": step.fill_(state["step"]), **{name: state[name] for name in MOMENTS}}

    @torch.no_grad()
    def loaded(self) -> None:
        """Refresh the working copies from the masters, and CPUAdam's counters."""
        for i, step in self._steps.items():
            self.optimizer.state[self._flats[i]]["step"] = int(step)
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for i in range(len(self._flats)):
            self.zero._reassign_or_swap_out_partitioned_parameters(i)
        # Small parameters stay gathered between steps: gather them anew.
        if kept := self.zero.persistent_parameters:
            kept[0].partition(kept)
            kept[0].all_gather(kept)


def _partition(p: nn.Parameter) -> tuple[int, int]:
    """(start, elements) of this rank's part of a ZeRO-3 parameter; the last parts may be padded or empty."""
    size = p.partition_numel()
    start = min(p.ds_process_group.rank() * size, p.ds_numel)
    return start, min(size, p.ds_numel - start)
