"""More than 2^31 elements: the last block of each CUDA kernel, run from its PTX, reaches the last elements.

The tensors' memory is never touched but at their ends, so they cost next to nothing. What is allocated may hold what
an earlier test left there, so the elements before those ends are NaN: none of them may count.
"""

import ctypes

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from gptdist import ops
from tests import adamw_cases, cuda_vm, test_cuda_attention

VM = torch.ops.gptdist_vm
WIDTH = 4096
ROWS = 2**31 // WIDTH + 5
BF16 = torch.bfloat16


def huge(last: torch.Tensor, *shape: int) -> torch.Tensor:
    """More than 2^31 elements of shape (ROWS, WIDTH), or `shape`: the last are `last`, the 2^20 before them NaN."""
    x = torch.empty(shape or (ROWS, WIDTH), dtype=last.dtype)
    assert x.numel() > 2**31
    end = x.view(-1)[-last.numel() - 2**20:].fill_(torch.nan)
    end[-last.numel():] = last.flatten()
    return x


def last_block(device, launcher: str, rows: int = ROWS, width: int = WIDTH, batch: int = 1):
    blocks = device.plan(launcher, BF16, rows, width, batch).grid[0]
    return device.run(blocks=(blocks - 1, blocks))


def close(got: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), exact, rtol=2.0**-8, atol=1e-3)


def test_layer_norm(device):
    last, weight, bias = torch.randn(1, WIDTH).to(BF16), torch.randn(WIDTH), torch.randn(WIDTH)
    x = huge(last)
    with last_block(device, "layer_norm_forward"):
        y, _, _ = VM.layer_norm_fwd(x, weight, bias, 1e-5)
    close(y[-1:], layer_norm(last.double(), (WIDTH,), weight.double(), bias.double(), 1e-5))


def test_bias_gelu(device):
    last, bias = torch.randn(4, WIDTH).to(BF16), torch.randn(WIDTH)
    x = huge(last)
    with last_block(device, "bias_gelu_forward"):
        y = VM.bias_gelu_fwd(x, bias)
    close(y[-1, -256:], gelu(last.double() + bias, approximate="tanh")[-1, -256:])


def test_cross_entropy(device):
    last, target = torch.randn(1, WIDTH).to(BF16), WIDTH - 3
    x = huge(last)
    targets = torch.full((ROWS,), target)
    with last_block(device, "cross_entropy_forward"):
        loss, lse = VM.cross_entropy_fwd(x, targets, -100)
    exact = last.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, targets[-1:])
    close(loss[-1], expected.detach())
    with last_block(device, "cross_entropy_backward"):
        VM.cross_entropy_bwd_(torch.ones(ROWS), x, targets, lse, -100)
    close(x[-1:], torch.autograd.grad(expected, exact)[0])


def test_dropout(device):
    last, ids = torch.randn(1, WIDTH).to(BF16), torch.tensor([7])
    x = huge(last)[None]
    key = ops.dropout_key(1, 2)
    with last_block(device, "dropout"):
        y = VM.dropout(x, 0.5, key, ids, 3, 0)
    expected = ops.dropout(last.double()[None], 0.5, key=key, sample_ids=ids, site=3, row_offset=ROWS - 1)
    close(y[0, -1, -256:], expected[0, 0, -256:])


# Lists: a tensor of more than 2^31 elements, of which the last are used, and a small one after it.

ELEMENTS = ROWS * WIDTH + 100
LAST = ELEMENTS % 16384  # all of its last chunk, in chunks of 8192 elements too


def list_blocks(chunk: int) -> tuple[int, int]:
    """The huge tensor's last block and the small one's."""
    return ELEMENTS // chunk, ELEMENTS // chunk + 2


def test_adamw(device):
    before = adamw_cases.make([(LAST,), (7,)], (BF16, torch.float32))
    lists = [before.params, before.grads, before.exp_avg, before.exp_avg_sq]
    huge_lists = [[huge(last, ELEMENTS), small.clone()] for last, small in lists]
    case = adamw_cases.Case(*huge_lists, None, before.grad_scale, before.options)
    with device.run(blocks=list_blocks(8192)) as log:
        case.run()
    assert log.launches[0].grid[0] == list_blocks(8192)[1]
    after = [[x[-LAST:], small] for x, small in huge_lists]
    adamw_cases.check(before, adamw_cases.Case(*after, None, before.grad_scale, before.options))


def test_grad_norm(device, monkeypatch):
    """The sums of the last two chunks: the kernel that adds them would need all the others."""
    last, small = torch.randn(LAST).to(BF16), torch.randn(7)
    execute, found = device._execute, []

    def intercepted(name, grid, block, shared_bytes, argument, *options):
        if "fold" in name:
            partials, count = (ctypes.c_uint64 * 5).from_address(argument)[2], list_blocks(16384)[1]
            found.extend((ctypes.c_double * count).from_address(partials)[-2:])
            return cuda_vm.Launch(name, grid, block, shared_bytes, b"", {})
        return execute(name, grid, block, shared_bytes, argument, *options)

    monkeypatch.setattr(device, "_execute", intercepted)
    with device.run(blocks=list_blocks(16384)):
        VM.grad_norm([huge(last, ELEMENTS), small])
    exact = [t.double().square().sum().item() for t in (last, small)]
    assert found == pytest.approx(exact, rel=1e-6)


def attention_blocks(first: tuple[str, ...], positions: int):
    """Of each grid: of the kernels named in `first` the first block, of the others the last one, of the statistics what
    `positions` need."""
    def blocks(kernel: str, count: int) -> tuple[int, int]:
        if "statistics" in kernel:
            return count - positions // 16, count
        return (0, 1) if any(name in kernel for name in first) else (count - 1, count)
    return blocks


def check_attention(device, qkv, doc_start, last, first: tuple[str, ...], queries: slice) -> None:
    """Forward and backward of qkv's last positions, which are `last` (1, T, 1, 3, D), by one block of each grid.

    first: the kernels whose first block that is. queries: which of the positions that block has, in forward and dq;
    dkv's has the last keys.
    """
    B, total, H, _, D = qkv.shape
    T = last.shape[1]
    dout, out = (torch.empty(B, total, H, 1, D, dtype=BF16) for _ in range(2))
    lse = torch.empty(B, H, 1, total)
    dout[-1, -T:] = torch.randn(T, H, 1, D)
    expected = test_cuda_attention.exact(last, dout[-1:, -T:], True, None, 1.0)
    with device.run(blocks=attention_blocks(first, T)):
        got, got_lse = VM.attention_fwd(qkv, True, doc_start, 0.0, None, None, 0, 0)
    relative, bound = test_cuda_attention.relative, 3 * 2.0**-8
    assert relative(got[-1, -T:][queries], expected[0][0][queries]) < bound
    close(got_lse[-1, :, :, -T:][..., queries], expected[1][0][..., queries])
    out[-1, -T:], lse[-1, :, :, -T:] = expected[0][0].to(BF16), expected[1][0].float()
    with device.run(blocks=attention_blocks(first, T)):
        dqkv = VM.attention_bwd(dout, qkv, out, lse, True, doc_start, 0.0, None, None, 0, 0)
    assert relative(dqkv[-1, -T:][queries, :, 0], expected[2][0][queries, :, 0]) < bound
    assert relative(dqkv[-1, -64:, :, 1:], expected[2][0][-64:, :, 1:]) < bound


@pytest.mark.parametrize("D", [64, 128])
def test_attention_of_many_rows(device, D):
    T = 256
    last = torch.randn(1, T, 1, 3, D).to(BF16)
    qkv = huge(last, 2**31 // (T * 3 * D) + 2, T, 1, 3, D)
    check_attention(device, qkv, None, last, (), slice(0, 128))  # the lightest tiles, of the first queries, come last


@pytest.mark.parametrize("D", [64, 128])
def test_attention_of_a_long_row(device, D):
    """A document of 256 positions at the end of it: earlier ones are not read."""
    T = 256
    last = torch.randn(1, T, 1, 3, D).to(BF16)
    total = (2**31 // (3 * D) // T + 2) * T
    qkv = huge(last, 1, total, 1, 3, D)
    doc_start = torch.zeros(1, total, dtype=torch.int32)
    doc_start[:, -T:] = total - T
    check_attention(device, qkv, doc_start, last, ("forward", "dq"), slice(T - 128, T))
