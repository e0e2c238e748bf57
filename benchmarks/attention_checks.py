"""Whether attention is right on a device: lengths around the tiles, grouped queries, documents, dropout.

Against gptdist/ops/attention.py's reference in float64, which goes block by block and so has room for long sequences.
An error is measured against the size of what it belongs to: norm(got - exact) / norm(exact), for the output and for
dq, dk and dv apart; the bound is three units in the last place. Where an exact gradient is next to nothing (a query
that sees one key), dv is the measure. Two runs must give the same bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.checks import Check, reference, short, with_gradients
from gptdist import ops

ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
KEY = (1, 2)  # seed and step of dropout's masks


@dataclass(frozen=True)
class AttentionCase:
    """B sequences of T positions, H kv heads with G queries each, D channels a head."""

    B: int
    T: int
    H: int
    G: int
    D: int
    documents: bool = False
    p: float = 0.0

    def __str__(self):
        options = ", documents" * self.documents + f", dropout {self.p}" * (self.p > 0)
        return f"B={self.B} T={self.T} H={self.H} G={self.G} D={self.D}{options}"


LENGTHS = (1, 7, 64, 128, 131, 200, 256, 512, 2048)
LONG = 16384
OPTIONS = ({}, {"documents": True}, {"p": 0.2}, {"documents": True, "p": 0.2})


def all_cases(lengths=LENGTHS, long: int = LONG) -> Iterator[AttentionCase]:
    """Plain ones first, then groups, documents and dropout; last the long one."""
    for D in (64, 128):
        for T in lengths:
            yield AttentionCase(2, T, 3, 1, D)
    for D in (64, 128):
        for T in lengths:
            for options in OPTIONS:
                yield AttentionCase(2, T, 2, 3, D, **options)
    for D in (64, 128):
        yield AttentionCase(1, long, 1, 2, D)


def random_documents(B: int, T: int, device: torch.device) -> torch.Tensor:
    """doc_start (B, T) int32 of documents that begin at random positions, about eight a row."""
    begins = torch.rand(B, T, device=device) < 8 / T
    begins[:, 0] = True
    return torch.where(begins, torch.arange(T, device=device), 0).cummax(1).values.int()


def packed(case: AttentionCase, device: torch.device):
    """Attention as a function of q (B, T, H, G, D), k and v (B, T, H, 1, D), so that their gradients come apart."""
    options = {}
    if case.documents:
        options["doc_start"] = random_documents(case.B, case.T, device)
    if case.p:
        ids = torch.arange(case.B, device=device) * ((1 << 33) + 1) + 5
        options |= {"dropout_p": case.p, "key": ops.dropout_key(*KEY, device), "sample_ids": ids}
        options |= {"site": 7, "head_offset": 3}
    return lambda q, k, v: ops.attention(torch.cat((q, k, v), 3), **options)


def relative_errors(got: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    """Of out, dq, dk, dv."""
    dv = exact[3].norm()
    sizes = [x.norm() for x in exact]
    sizes = [dv if size < dv / 100 else size for size in sizes]
    return [float((a.double() - b).norm() / size) for a, b, size in zip(got, exact, sizes, strict=True)]


def check(case: AttentionCase, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    tensors = tuple(torch.randn(case.B, case.T, case.H, n, case.D, device=device).to(dtype) for n in (case.G, 1, 1))
    function = packed(case, device)
    got, again = (with_gradients(function, tensors) for _ in range(2))
    with reference():
        exact = with_gradients(function, tensors, torch.float64)
    for name, error in zip(("out", "dq", "dk", "dv"), relative_errors(got, exact), strict=True):
        yield Check(f"attention {name}", short(dtype), str(case), error, 3 * ULP[dtype])
    different = sum(not torch.equal(a, b) for a, b in zip(got, again, strict=True))
    yield Check("attention repeated", short(dtype), str(case), different, 0, "tensors whose bits differ")


def check_opcheck(device: torch.device) -> Iterator[Check]:
    """torch.library.opcheck of both passes, with every option at once."""
    qkv = torch.randn(2, 70, 1, 4, 64, device=device).bfloat16()
    out, lse = torch.ops.gptdist.attention_fwd(qkv, None, 0.0, None, None, 0, 0)
    ids, starts = torch.arange(2, device=device), torch.zeros(2, 70, dtype=torch.int32, device=device)
    last = (starts, 0.2, ops.dropout_key(*KEY, device), ids, 1, 0)
    for name, arguments in (("attention_fwd", (qkv, *last)), ("attention_bwd", (out, qkv, out, lse, *last))):
        try:
            torch.library.opcheck(getattr(torch.ops.gptdist, name).default, arguments)
            yield Check(f"opcheck {name}", "bfloat16", "", 0, 0)
        except Exception as error:
            yield Check(f"opcheck {name}", "bfloat16", "", 1, 0, str(error).splitlines()[0])


def correctness(device: torch.device, lengths=LENGTHS, long: int = LONG) -> Iterator[Check]:
    torch.manual_seed(0)
    yield from check_opcheck(device)
    for case in all_cases(lengths, long):
        for dtype in ULP:
            yield from check(case, device, dtype)
