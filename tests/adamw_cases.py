"""Cases of adamw_ for several tests: tensors, the step in float64, and the bound that a step in fp32 keeps to."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptdist import ops

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EPS = 2.0**-24
OPTIONS = dict(lr=3e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3)


@dataclass(frozen=True)
class Case:
    params: list[Tensor]
    grads: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    shadows: list[Tensor] | None
    grad_scale: Tensor | None
    options: dict

    def clone(self) -> "Case":
        """The same values in memory of their own, as far from a multiple of 16 bytes."""
        lists = {name: tensors and [_clone(t) for t in tensors]
                 for name, tensors in vars(self).items() if name not in ("grad_scale", "options")}
        return replace(self, **lists)

    def run(self, op=ops.adamw_) -> None:
        op(self.params, self.grads, self.exp_avg, self.exp_avg_sq, shadows=self.shadows, grad_scale=self.grad_scale,
           **self.options)

    def outputs(self) -> list[Tensor]:
        return [*self.params, *self.exp_avg, *self.exp_avg_sq, *(self.shadows or [])]


def _clone(tensor: Tensor) -> Tensor:
    copy = placed(tensor.shape, tensor.dtype, tensor.data_ptr() % 16 // tensor.element_size())
    return copy.copy_(tensor)


def placed(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
    """An empty tensor that begins `offset` elements after a multiple of 16 bytes."""
    memory = torch.zeros(torch.Size(shape).numel() + offset + 16, dtype=dtype)
    first = -memory.data_ptr() % 16 // memory.element_size() + offset
    return memory[first:first + torch.Size(shape).numel()].view(shape)


def make(shapes, grad_dtypes=(FP32,), shadow_dtypes=(), scaled=True, offset=0, **options) -> Case:
    """A case of tensors of `shapes`, with the dtypes in turn; no shadows where shadow_dtypes is empty."""
    generator = torch.Generator().manual_seed(len(shapes))

    def tensors(dtypes, function):
        return [placed(shape, dtypes[i % len(dtypes)], offset).copy_(function(torch.randn(shape, generator=generator)))
                for i, shape in enumerate(shapes)]

    shadows = tensors(shadow_dtypes, lambda x: x) if shadow_dtypes else None
    return Case(tensors((FP32,), lambda x: 2 * x), tensors(grad_dtypes, lambda x: x),
                tensors((FP32,), lambda x: 0.3 * x), tensors((FP32,), lambda x: 0.2 * x**2), shadows,
                torch.tensor(0.37) if scaled else None, OPTIONS | options)


def check(before: Case, after: Case) -> None:
    """`after` is what a step in exact arithmetic makes of `before`, but for a few roundings of fp32."""
    o = before.options
    scale = 1.0 if before.grad_scale is None else before.grad_scale.double()
    for i in range(len(before.params)):
        g = before.grads[i].double() * scale
        p, m, v = (list_[i].double() for list_ in (before.params, before.exp_avg, before.exp_avg_sq))
        exact_m = m + (1 - o["beta1"]) * (g - m)
        exact_v = o["beta2"] * v + (1 - o["beta2"]) * g**2
        step = o["lr"] / (1 - o["beta1"]**o["step"])
        update = step * exact_m / (exact_v.sqrt() / (1 - o["beta2"]**o["step"])**0.5 + o["eps"])
        exact_p = p * (1 - o["lr"] * o["weight_decay"]) - update
        size_m = m.abs() + g.abs()
        _within(f"exp_avg[{i}]", after.exp_avg[i], exact_m, 4 * EPS * size_m)
        _within(f"exp_avg_sq[{i}]", after.exp_avg_sq[i], exact_v, 6 * EPS * exact_v + 2.0**-149)
        # m may cancel: its absolute error goes into the update. v's relative error is halved by the root.
        error = 12 * EPS * update.abs() + 4 * EPS * size_m * (update / exact_m).abs().nan_to_num(0.0)
        _within(f"params[{i}]", after.params[i], exact_p, 4 * EPS * p.abs() + error)
        if after.shadows is not None:
            assert torch.equal(after.shadows[i], after.params[i].to(after.shadows[i].dtype)), f"values of shadows[{i}]"


def _within(name: str, got: Tensor, exact: Tensor, bound: Tensor) -> None:
    excess = ((got.double() - exact).abs() / (bound + 1e-300)).max().item() if got.numel() else 0.0
    assert excess <= 1.0, f"values of {name}: {excess:.2f} times the bound"  # NaN fails too
