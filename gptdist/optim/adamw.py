"""AdamW with decay groups, and the slots that a checkpoint stores for it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gptdist import ops
from gptdist.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW by ops.adamw_: all parameters of a group in one pass, the gradient's scale included.

    Parameters are fp32 (or fp64), contiguous; of a DTensor the local shard is stepped. A parameter's `step` lies on the
    CPU, so that no step waits for the device. `shadows`: copies of parameters in 16 bits that a step keeps up to date.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float,
                 weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, lr_ratio=1.0))
        self.shadows: Mapping[nn.Parameter, Tensor] = {}

    # torch's own without their decorator, at whose first call torch.compile is imported: a second of each start.
    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__
    zero_grad = torch.optim.Optimizer.zero_grad.__wrapped__

    def slot_names(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """What a checkpoint stores for one parameter."""
        return ("step", *MOMENTS)

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step: a group's is this times its lr_ratio."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_ratio"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | None = None) -> Any:
        """Step the parameters that have a gradient. grad_scale: fp32, (), on their device; scales gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_all(grad_scale)
        return loss

    def _step_all(self, grad_scale: Tensor | None) -> None:
        for group in self.param_groups:
            self._step_group(group, grad_scale)

    def _step_group(self, group: dict[str, Any], grad_scale: Tensor | None) -> None:
        for (step, shadowed), parameters in self._alike(group).items():
            shadows = [self.shadows[p] for p in parameters] if shadowed else None
            self._step(group, step, parameters, shadows, grad_scale)

    def _alike(self, group: dict[str, Any]) -> dict[tuple[int, bool], list[nn.Parameter]]:
        """The group's parameters with a gradient, by the number of the step they take and if they have a shadow."""
        alike: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for p in group["params"]:
            if p.grad is not None:
                step = slots(self, p)["step"].add_(1)
                alike.setdefault((int(step), p in self.shadows), []).append(p)
        return alike

    def _step(self, group: dict[str, Any], step: int, parameters: list[nn.Parameter], shadows: list[Tensor] | None,
              grad_scale: Tensor | None) -> None:
        moments = [[local(self.state[p][name]) for p in parameters] for name in MOMENTS]
        beta1, beta2 = group["betas"]
        ops.adamw_([local(p) for p in parameters], [local(p.grad).contiguous() for p in parameters], *moments,
                   shadows=shadows, grad_scale=grad_scale, lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
                   weight_decay=group["weight_decay"], step=step)


def build_adamw(parameters: list[tuple[str, nn.Parameter]], config: OptimConfig) -> AdamW:
    """AdamW whose matrices (two or more dimensions) decay; biases and norms do not."""
    return AdamW(adamw_groups(parameters, config), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def adamw_groups(parameters: list[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """Parameters with decay and without."""
    matrices = [p for _, p in parameters if p.dim() >= 2]
    vectors = [p for _, p in parameters if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return [group for group in groups if group["params"]]


def slots(optimizer: AdamW, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's tensors for one parameter, by slot name; made (zero) where no step has been taken yet."""
    state = optimizer.state[parameter]
    names = optimizer.slot_names(parameter)
    if not state:
        for name in names:
            state[name] = (torch.zeros((), dtype=torch.float32) if name == "step" else
                           torch.zeros_like(parameter, memory_format=torch.preserve_format))
    return {name: state[name] for name in names}


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
