"""Muon for the matrices of the blocks and AdamW for everything else, in one optimizer.

    M <- M + (1 - momentum)(G - M),  U = G + momentum (M - G)
    W <- W (1 - lr weight_decay) - lr sqrt(max(1, rows / columns)) orthogonal(U)

orthogonal(U) has U's singular vectors, and singular values near 1, by Newton and Schulz's iteration. A packed qkv is
three matrices. Sharded matrices are taken as many at a time as there are shards: every rank gathers one of them whole,
orthogonalises it, and sends the parts back. A checkpoint stores `momentum_buffer` for a matrix, sharded as its weight.
Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gptdist.config import Config
from gptdist.lora import HeadRows
from gptdist.optim.adamw import AdamW, adamw_groups, local, slots

# a X + b X X'X + c (X X')^2 X: steep at 0, so that few steps are enough; they end in [0.7, 1.2] rather than at 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)

Parts = Callable[[Tensor], list[Tensor]]  # a matrix -> views of it, (..., columns), each to be orthogonalised by itself


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """(rows, columns) -> the same, in its dtype: its singular vectors, singular values near 1. Zeros stay zeros."""
    a, b, c = COEFFICIENTS
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix  # the products are then of the shorter side
    x = x / x.norm().clamp(min=1e-30)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def direction(matrix: Tensor, parts: Parts, steps: int) -> Tensor:
    """The step of a whole matrix at a learning rate of 1."""
    result = torch.empty_like(matrix)
    for part, out in zip(parts(matrix), parts(result), strict=True):
        rows = part.reshape(-1, part.shape[-1])
        scale = max(1.0, rows.shape[0] / rows.shape[1]) ** 0.5
        out.copy_((orthogonal(rows, steps) * scale).view(part.shape))
    return result


class Muon(AdamW):
    """AdamW whose groups that have `parts` are stepped by Muon: their parameters are matrices.

    dtype: of the iteration and of what ranks exchange for it.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, nesterov: bool, steps: int,
                 dtype: torch.dtype, **adamw: Any):
        super().__init__(groups, **adamw)
        self.momentum, self.nesterov, self.steps, self.dtype = momentum, nesterov, steps, dtype
        self._matrices = {p for group in self.param_groups if "parts" in group for p in group["params"]}

    def slot_names(self, parameter: nn.Parameter) -> tuple[str, ...]:
        return ("momentum_buffer",) if parameter in self._matrices else super().slot_names(parameter)

    def _step_all(self, grad_scale: Tensor | None) -> None:
        for group in self.param_groups:
            if "parts" not in group:
                self._step_group(group, grad_scale)
        matrices = [(p, group) for group in self.param_groups if "parts" in group for p in group["params"]
                    if p.grad is not None]
        for p, group, step in self._directions(matrices, grad_scale):
            values = local(p)
            values.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-group["lr"])
            if p in self.shadows:
                self.shadows[p].copy_(values)

    def _directions(self, matrices: list[tuple[nn.Parameter, dict]], grad_scale: Tensor | None
                    ) -> Iterator[tuple[nn.Parameter, dict, Tensor]]:
        """(parameter, its group, this rank's part of its step) of each."""
        whole = [entry for entry in matrices if not isinstance(entry[0], DTensor)]
        for p, group in whole:
            yield p, group, direction(self._update(p, grad_scale), group["parts"], self.steps)
        # Those of one size together, so that no rank waits long for another's.
        sharded = sorted((e for e in matrices if isinstance(e[0], DTensor)), key=lambda e: e[0].numel(), reverse=True)
        while sharded:
            ranks = sharded[0][0].device_mesh.get_group("dp_shard")
            some, sharded = sharded[:ranks.size()], sharded[ranks.size():]
            updates = [self._update(p, grad_scale) for p, _ in some]
            work = [(p.shape, partial(direction, parts=group["parts"], steps=self.steps)) for p, group in some]
            for (p, group), step in zip(some, on_one_rank_each(updates, work, ranks), strict=True):
                yield p, group, step

    def _update(self, p: nn.Parameter, grad_scale: Tensor | None) -> Tensor:
        """Count the gradient into the momentum; this rank's part of what is to be orthogonalised."""
        gradient = local(p.grad).to(p.dtype)
        if grad_scale is not None:
            gradient = gradient * grad_scale
        momentum = local(slots(self, p)["momentum_buffer"])
        momentum.lerp_(gradient, 1 - self.momentum)
        return (gradient.lerp(momentum, self.momentum) if self.nesterov else momentum).to(self.dtype)


def on_one_rank_each(parts: list[Tensor], work: list[tuple[torch.Size, Callable[[Tensor], Tensor]]],
                     ranks: dist.ProcessGroup) -> list[Tensor]:
    """This rank's parts of f(matrix) for up to as many matrices as there are ranks; a collective call.

    parts: this rank's rows of each matrix, cut as FSDP2 does. work: (shape, f) of each; rank i computes the i-th.
    """
    rank, size = ranks.rank(), ranks.size()
    sent = [part.numel() for part in parts] + [0] * (size - len(parts))
    rows, columns = work[rank][0] if rank < len(work) else (0, 0)
    most = -(-rows // size)
    received = [min(most, max(0, rows - i * most)) * columns for i in range(size)]
    flat = torch.cat([part.flatten() for part in parts])
    whole = flat.new_empty(rows * columns)
    dist.all_to_all_single(whole, flat, received, sent, group=ranks)
    if rank < len(work):
        whole = work[rank][1](whole.view(rows, columns)).flatten()
    dist.all_to_all_single(flat, whole, sent, received, group=ranks)
    return [done.view_as(part) for done, part in zip(flat.split(sent[:len(parts)]), parts, strict=True)]


def build_muon(parameters: list[tuple[str, nn.Parameter]], config: Config) -> Muon:
    """Muon for the blocks' matrices among `parameters`, AdamW for the others. config: its precision is decided."""
    assert config.train.precision != "auto", "the precision is resolved before an optimizer is built"
    optim, matrices = config.optim, {}
    for name, p in parameters:
        if name.startswith("blocks.") and p.dim() == 2:
            matrices.setdefault(_kind(name, config), []).append(p)
    others = [(name, p) for name, p in parameters if not (name.startswith("blocks.") and p.dim() == 2)]
    groups = [dict(params=params, parts=partial(_PARTS[kind], config=config), weight_decay=optim.weight_decay,
                   lr_ratio=optim.muon_lr / optim.lr) for kind, params in matrices.items()]
    return Muon(groups + adamw_groups(others, optim), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps,
                momentum=optim.momentum, nesterov=optim.nesterov, steps=optim.newton_schulz_steps,
                dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32)


def _kind(name: str, config: Config) -> str:
    if name.endswith(("attn.qkv.weight", "attn.qkv.lora_B")):
        return "qkv rows"
    return "three" if name.endswith("attn.qkv.lora_A") and config.lora.split_qkv else "one"


def _qkv_rows(matrix: Tensor, config: Config) -> list[Tensor]:
    """Queries, keys and values (kv heads, n, head_dim, columns) of a matrix whose rows are those of a qkv."""
    heads = HeadRows.of(config.model)
    by_head = matrix.view(-1, heads.slots, heads.head_dim, matrix.shape[1])
    return [by_head[:, :-2], by_head[:, -2:-1], by_head[:, -1:]]


_PARTS = {"one": lambda matrix, config: [matrix], "three": lambda matrix, config: list(matrix.chunk(3)),
          "qkv rows": _qkv_rows}
