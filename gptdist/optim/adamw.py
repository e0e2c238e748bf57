"""AdamW with decay groups, and the slots that a checkpoint stores for it."""

import torch
from torch import Tensor, nn

from gptdist.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_adamw(parameters: list[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW: matrices (two or more dimensions) decay, biases and norms do not."""
    matrices = [p for _, p in parameters if p.dim() >= 2]
    vectors = [p for _, p in parameters if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2),
                             eps=config.eps, fused=True)


def slots(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's tensors for one parameter, by slot name; made (zero) where no step has been taken yet."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for name in MOMENTS:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return {name: state[name] for name in ("step", *MOMENTS)}
