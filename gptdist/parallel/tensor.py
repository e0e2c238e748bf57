"""Tensor parallelism: the processes of a group divide heads, hidden units, vocabulary and positions.

    weight                        divided by            a process computes
    wte, head                     vocabulary rows       partial embeddings; its part of the log-sum-exp
    qkv, mlp.fc (and biases)      output rows           its kv heads with their queries; its hidden units
    attn.proj, mlp.proj           input columns         partial sums of the branch
    norms, wpe, proj biases       not                   its own positions of the residual stream
    an adapter's A and B          as that side of its weight: a product as the weight's

Between the matrix products each process has T/n positions of the residual stream (sequence parallelism): an all-gather
over T leads into a block's branch, a reduce-scatter over T out of it; the backward of each is the other.
Parameters are DTensors on the `tp` mesh, so that FSDP2 shards them further and a checkpoint sees logical tensors.
Sources: Shoeybi et al., "Megatron-LM" (2019), section 3; Korthikanti et al., "Reducing activation recomputation in
large transformer models" (2022), section 4.2.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from gptdist import ops
from gptdist.model import GPT, Dropout, Linear, Whole

ROWS, COLUMNS = Shard(0), Shard(1)

# Torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def shard_tensors(model: GPT, mesh: DeviceMesh) -> None:
    """Divide a model on the meta device over a 1-D mesh, before FSDP2 shards it further."""
    model.parallel = TensorParallel(mesh)
    for prefix, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        for name in names:
            placement = placement_of(f"{prefix}.{name}")
            # Without a source rank each process takes its own part: nothing is sent.
            whole = getattr(module, name)
            part = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
            setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))
        if names:
            _read_locally(module)


def placement_of(name: str) -> Placement:
    """How tensor parallelism divides the parameter of this name."""
    module, kind = name.split(".")[-2:]
    if module in ("wte", "head", "qkv", "fc") and kind != "lora_A":
        return ROWS
    if module == "proj" and kind in ("weight", "lora_A"):
        return COLUMNS
    return Replicate()


def is_replicated(parameter: Tensor) -> bool:
    """Every process of a tensor-parallel group has the whole of what FSDP leaves it."""
    return parameter.placements[-1].is_replicate()


class _LocalParameters(nn.Module):
    """Mixed into a module's class: a parameter that FSDP2 has gathered reads as this process's part, a plain tensor.

    A replicated parameter meets this process's positions, or its part of a product, alone, so its gradients are to be
    summed over the group: they are `Partial`, and FSDP2 turns that into the sum once per backward.
    """

    def __getattr__(self, name: str):
        value = super().__getattr__(name)
        if not isinstance(value, DTensor) or value.device_mesh.ndim > 1:  # FSDP2's shards lie on a mesh of more
            return value
        return value.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in value.placements])


def _read_locally(module: nn.Module) -> None:
    cls = module.__class__
    module.__class__ = type(f"Local{cls.__name__}", (_LocalParameters, cls), {})


class TensorParallel(Whole):
    """This process's share of the work; see Whole for the shapes."""

    def __init__(self, mesh: DeviceMesh):
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()

    def embed(self, wte: nn.Embedding, tokens: Tensor) -> Tensor:
        weight = wte.weight  # (V / n, C)
        if tokens.shape[1] % self.size:
            raise ValueError(f"tokens {tuple(tokens.shape)}: {self.size} processes cannot divide these positions")
        index = tokens - self.rank * weight.shape[0]
        elsewhere = (index < 0) | (index >= weight.shape[0])  # (B, T)
        x = F.embedding(index.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[..., None], 0.0)
        return _SumToOwn.apply(x, self.group)

    def embed_tied(self, wte: nn.Embedding, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(wte, tokens), wte.weight

    def own(self, positions: Tensor) -> Tensor:
        return positions.chunk(self.size, dim=-1)[self.rank]

    def enter(self, x: Tensor) -> Tensor:
        return _GatherPositions.apply(x, self.group)

    def leave(self, x: Tensor, proj: Linear, dropout: Dropout | None) -> Tensor:
        x = _SumToOwn.apply(proj.product(x, dropout), self.group)
        bias = proj.bias
        return x if bias is None else x + bias

    def computed_by_all(self, x: Tensor) -> Tensor:
        return _CountOnce.apply(x, self.size)

    def linear_cross_entropy(self, hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int,
                             ignore_index: int, shadow: Tensor | None = None) -> Tensor:
        assert shadow is None, "FSDP casts what it gathers"
        lse, picked = ops.linear_logsumexp(hidden, weight, targets, first=self.rank * weight.shape[0],
                                           vocab_size=vocab_size, ignore_index=ignore_index)
        return _JoinVocabulary.apply(lse, picked, self.group).masked_fill(targets == ignore_index, 0.0)


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, T_own, C) -> (B, T, C)."""
    parts = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    _all_gather(parts, x.contiguous(), group=group)
    return parts.unflatten(0, (group.size(), x.shape[0])).transpose(0, 1).flatten(1, 2)  # (n, B, T_own, C), (B, T, C)


def _scatter_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, T, C) -> (B, T_own, C), summed over the group."""
    parts = x.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()  # (n, B, T_own, C)
    own = torch.empty_like(parts[0])
    _reduce_scatter(own, parts.flatten(0, 1), group=group)
    return own


class _GatherPositions(Function):
    """All-gather over T. Each process's gradient is that of its own product alone: the sum of them comes back."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx, dy):
        return _scatter_sum(dy, ctx.group), None


class _SumToOwn(Function):
    """Reduce-scatter over T of partial sums."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _scatter_sum(x, group)

    @staticmethod
    def backward(ctx, dy):
        return _gather(dy, ctx.group), None


class _CountOnce(Function):
    """x, the same on all n processes; each has 1/n of the gradient, because what comes before sums over processes."""

    @staticmethod
    def forward(ctx, x, n):
        ctx.n = n
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return dy / ctx.n, None


class _JoinVocabulary(Function):
    """Losses (N,) = logsumexp of all shards' lse (N,) minus the one shard's picked (N,), by two small all-reduces.

    Every process has the same losses and the same gradient of them: the backward sends nothing.
    """

    @staticmethod
    def forward(ctx, lse, picked, group):
        highest = lse.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        sums = torch.stack([(lse - highest).exp_(), picked])  # (2, N)
        dist.all_reduce(sums, group=group)
        total, target = sums
        joined = highest + total.log()
        ctx.save_for_backward(lse, joined)
        return joined - target

    @staticmethod
    def backward(ctx, dloss):
        lse, joined = ctx.saved_tensors
        return dloss * (lse - joined).exp_(), -dloss, None
