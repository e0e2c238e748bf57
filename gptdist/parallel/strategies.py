"""How a model is spread over the ranks: single, ddp, fsdp, hsdp (and zero.py's ZeRO) behind one protocol.

A step: for each micro-batch `with strategy.micro_batch(is_last): strategy.backward(strategy(...))`, then `grad_norm()`,
then `apply(lr, clip)` or `discard()`. Losses are sums over tokens; `backward` divides once by the global count.
With the same global batch in fp32 every strategy gives the same loss curve.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gptdist import ops
from gptdist.config import Config
from gptdist.faults.bad_steps import is_finite
from gptdist.model import LanguageModel, Linear
from gptdist.optim.adamw import AdamW, local, slots
from gptdist.parallel.flat_shard import FlatShard
from gptdist.parallel.host import has_bf16
from gptdist.parallel.init import fill_initial_values
from gptdist.parallel.tensor import is_replicated, shard_tensors
from gptdist.parallel.world import World

OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


class Strategy:
    """One process, and what the others share. `model` has plain parameter names; calling the strategy runs it."""

    def __init__(self, world: World, config: Config):
        lacking = world.sum(torch.tensor(0 if has_bf16(world.device) else 1))
        self.world = world
        self.config = replace(config, train=config.train.resolved(int(lacking) == 0))
        self.model: nn.Module
        self.n_parameters: int  # of the whole model
        self.optimizer: AdamW | None = None
        self.shadows: dict[nn.Parameter, Tensor] = {}  # bf16 copies of weights, for the products
        self.on_call: Callable[[], object] = lambda: None  # told of every forward, training or not
        self._norm: Tensor | None = None

    def prepare(self, model: nn.Module, optimizer_factory: OptimizerFactory | None) -> None:
        """Take a model on the meta device: shard it, give it memory and initial values, make its optimizer."""
        self._configure(model)
        self._shard(model)
        model.to_empty(device=self.world.device)
        self.model = model
        fill_initial_values(model, seed=self.config.run.seed)
        self._wrap()
        if optimizer_factory is not None:
            self.optimizer = optimizer_factory(self.trainable())
            self.optimizer.shadows = self.shadows
        self.loaded()

    def _configure(self, model: nn.Module) -> None:
        """What does not depend on how the model is spread."""
        self.n_parameters = sum(p.numel() for p in model.parameters())
        model.checkpoint_blocks(self.config.train.checkpoint_every_block)
        if self.config.train.compile:
            for block in model.blocks:
                block.compile()

    def _shard(self, model: nn.Module) -> None:
        """Replace the parameters of the meta model by their shards."""

    def _wrap(self) -> None:
        """Wrap the materialised model for calling."""

    def _add_shadows(self) -> None:
        """Where the products are bf16, keep bf16 copies of their weights: nothing is cast in a step."""
        if self.config.train.precision != "bf16":
            return
        for module in self.model.modules():
            if isinstance(module, Linear):
                module.shadow = self._new_shadow(module.weight)
        if isinstance(self.model, LanguageModel):
            self.model.head_shadow = self._new_shadow(self.model.head_weight)

    def _new_shadow(self, weight: nn.Parameter) -> Tensor:
        self.shadows[weight] = torch.empty_like(weight, dtype=torch.bfloat16)
        return self.shadows[weight]

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.on_call()
        with self._compute():
            return self._forward_module()(*args, **kwargs)

    def _forward_module(self) -> nn.Module:
        return self.model

    def _compute(self) -> contextlib.AbstractContextManager:
        bf16 = self.config.train.precision == "bf16"
        return torch.autocast(self.world.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def micro_batch(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Around one forward and backward; gradients of all micro-batches are summed."""
        return contextlib.nullcontext()

    def backward(self, loss_sum: Tensor, n_targets: int) -> None:
        """Accumulate the gradient of (sum of losses over all ranks) / n_targets; n_targets is global."""
        (loss_sum * (self._averages_over() / max(n_targets, 1))).backward()

    def _averages_over(self) -> int:
        """Ranks whose gradients the reduction averages, where the sum is wanted."""
        return 1

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Global L2 norm of the gradient, () fp32 on the device."""
        grads = [local(p.grad) for p in self._norm_parameters() if p.grad is not None]
        self._norm = self._combine_norm(ops.grad_norm(grads))
        return self._norm

    def _norm_parameters(self) -> list[nn.Parameter]:
        """Those whose local gradients this rank counts in the norm."""
        return [p for _, p in self.trainable()]

    def _combine_norm(self, local: Tensor) -> Tensor:
        return local

    def apply(self, lr: float, clip: float) -> None:
        """Scale the gradient to a norm of at most `clip` (0: leave it), step, and drop the gradient."""
        assert self._norm is not None, "grad_norm() comes before apply()"
        # 1e-6 as torch.nn.utils.clip_grad_norm_, so that both clip alike.
        scale = (clip / (self._norm + 1e-6)).clamp(max=1.0) if clip > 0 else None
        self.optimizer.set_lr(lr)
        self.optimizer.step(grad_scale=scale)
        self.discard()

    def discard(self) -> None:
        """Drop the accumulated gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        self._norm = None

    def bad_gradients(self) -> list[str]:
        """Parameters of whose accumulated gradient this rank holds a part that is not finite. Before apply or discard.

        With several ranks it has been reduced: what one of them computed is in all.
        """
        return [name for name, p in self.trainable() if p.grad is not None and not is_finite(local(p.grad))]

    def bad_weights(self) -> list[str]:
        """Parameters of which this rank holds a part that is not finite."""
        return [key.removeprefix("model.") for key, tensor in self.model_state().items() if not is_finite(held(tensor))]

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, no gradient synchronisation."""
        with torch.no_grad():
            yield

    def model_state(self) -> dict[str, Tensor]:
        """`model.<name>` -> fp32 master weight (plain or DTensor), to be saved or filled in place; tied ones once."""
        return {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}

    def loaded(self) -> None:
        """Called after the tensors of model_state() or state() were filled, by a checkpoint or initial values."""
        for parameter, shadow in self.shadows.items():
            shadow.copy_(parameter.detach())

    def state(self) -> dict[str, Tensor]:
        """model_state and `optim.<name>.<slot>`."""
        optim = {f"optim.{name}.{slot}": value for name, p in self.trainable()
                 for slot, value in slots(self.optimizer, p).items()}
        return self.model_state() | optim

    def replicas(self) -> list[tuple[dist.ProcessGroup | None, dict[str, Tensor]]]:
        """(process group, None for all ranks; key -> what each of its ranks holds alike): for check_replicas."""
        return []


class Single(Strategy):
    """One process holds everything. Gradients of weights with a shadow are bf16, and summed in fp32."""

    def _wrap(self) -> None:
        self._add_shadows()
        for parameter in self.shadows:
            parameter.grad_dtype = None  # any: it need not be cast to fp32 for the optimizer to read

    @contextlib.contextmanager
    def micro_batch(self, is_last: bool) -> Iterator[None]:
        yield
        for parameter in () if is_last else self.shadows:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.float()


class DDP(Strategy):
    """A replica on every rank; gradients are averaged in fp32 during the last micro-batch's backward."""

    def _wrap(self) -> None:
        self._add_shadows()
        self._ddp = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self._evaluating = False

    def _forward_module(self) -> nn.Module:
        return self.model if self._evaluating else self._ddp

    def micro_batch(self, is_last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if is_last else self._ddp.no_sync()

    def _averages_over(self) -> int:
        return self.world.size

    def replicas(self) -> list[tuple[dist.ProcessGroup | None, dict[str, Tensor]]]:
        return [(None, self.state())]

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self._evaluating = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._evaluating = False


class FSDP(Strategy):
    """FSDP2: every parameter, gradient and optimizer slot is sharded over its first dimension.

    With parallel.tensor > 1 tensor.py has divided the layers before, and FSDP2 shards what each rank got.

    Gradients are reduced in every micro-batch, so that no rank keeps an unsharded gradient while accumulating.
    """

    def _shard(self, model: nn.Module) -> None:
        policy = MixedPrecisionPolicy()
        if self.config.train.precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if self.world.tensor > 1:
            shard_tensors(model, self.world.mesh["tp"])
        options = dict(mesh=self._mesh(), mp_policy=policy)
        for block in model.blocks:
            fully_shard(block, reshard_after_forward=self.config.parallel.reshard_after_forward, **options)
        fully_shard(model, **options)

    def _mesh(self) -> DeviceMesh:
        return self.world.mesh["dp_shard"]

    def _compute(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # the mixed precision policy casts

    def _averages_over(self) -> int:
        return self.world.dp_size

    def _norm_parameters(self) -> list[nn.Parameter]:
        parameters = super()._norm_parameters()
        if self.world.rank % self.world.tensor == 0:
            return parameters
        return [p for p in parameters if not is_replicated(p)]  # the group's first rank has them

    def _combine_norm(self, local: Tensor) -> Tensor:
        squared = local.double() ** 2
        for dimension in ("dp_shard", "tp"):
            dist.all_reduce(squared, group=self.world.mesh[dimension].get_group())
        return squared.sqrt().float()

    def replicas(self) -> list[tuple[dist.ProcessGroup | None, dict[str, Tensor]]]:
        if self.world.tensor == 1:
            return []
        whole = {key: local(tensor) for key, tensor in self.state().items()
                 if isinstance(tensor, DTensor) and is_replicated(tensor)}
        return [(self.world.mesh["tp"].get_group(), whole)]

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        with torch.no_grad():
            yield
        # Without a backward the gathered weights would stay, and stand in for the shards in named_parameters().
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class HSDP(FSDP):
    """FSDP2 inside each group of ranks; the groups hold copies of each other's shards and average their gradients."""

    def _mesh(self) -> DeviceMesh:
        return self.world.mesh["dp_replicate", "dp_shard"]

    def replicas(self) -> list[tuple[dist.ProcessGroup | None, dict[str, Tensor]]]:
        own = {key: local(tensor) for key, tensor in self.state().items()}
        return [(self.world.mesh["dp_replicate"].get_group(), own), *super().replicas()]


STRATEGIES: dict[str, type[Strategy]] = {"single": Single, "ddp": DDP, "fsdp": FSDP, "hsdp": HSDP}


def make_strategy(world: World, config: Config) -> Strategy:
    if world.strategy.startswith("zero"):
        from gptdist.parallel.zero import ZeRO  # DeepSpeed is optional, and slow to import

        return ZeRO(world, config)
    return STRATEGIES[world.strategy](world, config)


def held(tensor: Tensor) -> Tensor:
    """This rank's values of a tensor of a strategy's state, plain."""
    return tensor.flat if isinstance(tensor, FlatShard) else local(tensor)
