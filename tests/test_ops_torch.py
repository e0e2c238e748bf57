"""What every op promises to PyTorch: opcheck, torch.compile(fullgraph=True), autocast, empty inputs, no_grad."""

import pytest
import torch

from gptdist import ops

KEY = ops.dropout_key(1, 2)


def randn(*shape, grad=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)


def adamw_step(param, grad):
    """New values of a copy of param, and its shadow."""
    param, shadow = param.clone(), param.bfloat16()
    moments = [torch.zeros_like(param) for _ in range(2)]
    ops.adamw_([param], [grad], [moments[0]], [moments[1]], shadows=[shadow], lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8,
               weight_decay=0.1, step=1)
    return param, shadow


def cases(B=2, dtype=torch.float32):
    """name -> (public function of tensors, its tensors). B = 0 gives empty batches."""
    ids = torch.arange(B)
    T, H, G, D, C, V = 5, 2, 2, 4, 6, 9
    qkv = randn(B, T, H, G + 2, D, dtype=dtype)
    x = randn(B, T, C, dtype=dtype)
    cos, sin = ops.rope_tables(torch.arange(T), D)
    starts = torch.zeros(B, T, dtype=torch.int32)
    starts[:, 3:] = 3
    targets = torch.arange(B * T) % 7
    mask = {"key": KEY, "sample_ids": ids, "site": 1}
    cache = randn(4, 4, H, D, grad=False, dtype=dtype)
    table = torch.arange(B * 2, dtype=torch.int32).view(B, 2) % 4
    parameters = (randn(C), randn(C))
    return {
        "attention": (ops.attention, (qkv,)),
        "attention documents dropout": (
            lambda a: ops.attention(a, doc_start=starts, dropout_p=0.2, **mask),
            (qkv,),
        ),
        "layer_norm": (ops.layer_norm, (x, *parameters)),
        "layer_norm without bias": (ops.layer_norm, (x, parameters[0])),
        "residual_layer_norm": (ops.residual_layer_norm, (x, randn(B, T, C), *parameters)),
        "bias_gelu": (ops.bias_gelu, (x, parameters[1])),
        "bias_gelu without bias": (ops.bias_gelu, (x,)),
        "cross_entropy": (lambda a: ops.cross_entropy(a, targets), (randn(B * T, V, dtype=dtype),)),
        "linear_cross_entropy": (
            lambda a, w: ops.linear_cross_entropy(a, w, targets, vocab_size=8),
            (randn(B * T, C, dtype=dtype), randn(V, C)),
        ),
        "linear_logsumexp": (
            lambda a, w: ops.linear_logsumexp(a, w, targets, first=2, vocab_size=8),
            (randn(B * T, C, dtype=dtype), randn(V, C)),
        ),
        "dropout": (lambda a: ops.dropout(a, 0.2, **mask), (x,)),
        "rope": (lambda a: ops.rope(a, cos, sin), (qkv,)),
        "grad_norm": (lambda a, b: ops.grad_norm([a, b]), (randn(3, 4, grad=False), randn(5, grad=False))),
        "adamw_": (adamw_step, tuple(randn(3, 4, grad=False) for _ in range(2))),
        "decode_attention": (
            lambda q: ops.decode_attention(q, cache, cache, table, torch.full((B,), 2)),
            (randn(B, 1, H, G, D, grad=False, dtype=dtype),),
        ),
    }


NAMES = list(cases())
G = torch.ops.gptdist
QKV = randn(2, 5, 2, 4, 4)
X, R, W, BIAS = randn(2, 5, 6), randn(2, 5, 6), randn(6), randn(6)
IDS, TARGETS = torch.arange(2), torch.tensor([1, 2, -100, 4])
STATISTIC = torch.rand(2, 5) + 0.5
LSE = torch.rand(2, 2, 2, 5) + 3
ADAMW_LISTS = tuple([randn(3, 4, grad=False).abs() + i] for i in range(4))
OPCHECKS = {
    "attention_fwd": (QKV, None, 0.0, None, None, 0, 0),
    "attention_fwd dropout": (QKV, torch.zeros(2, 5, dtype=torch.int32), 0.2, KEY, IDS, 1, 0),
    "attention_bwd": (randn(2, 5, 2, 2, 4), QKV, randn(2, 5, 2, 2, 4), LSE, None, 0.0, None, None, 0, 0),
    "decode_attention": (
        randn(2, 1, 2, 2, 4, grad=False),
        randn(4, 4, 2, 4, grad=False),
        randn(4, 4, 2, 4, grad=False),
        torch.zeros(2, 1, dtype=torch.int32),
        torch.tensor([1, 3]),
    ),
    "layer_norm_fwd": (X, W, BIAS, 1e-5, torch.float32),
    "layer_norm_fwd bf16": (randn(2, 5, 6, dtype=torch.bfloat16), W, None, 1e-5, torch.bfloat16),
    "layer_norm_fwd fp32 to bf16": (X, W, None, 1e-5, torch.bfloat16),
    "layer_norm_bwd": (randn(2, 5, 6), X, STATISTIC, STATISTIC, W, BIAS),
    "residual_layer_norm_fwd": (X, R, W, BIAS, 1e-5),
    "residual_layer_norm_fwd bf16": (randn(2, 5, 6, dtype=torch.bfloat16), R, W, None, 1e-5),
    "residual_layer_norm_bwd": (randn(2, 5, 6), randn(2, 5, 6), X, STATISTIC, STATISTIC, W, BIAS),
    "bias_gelu_fwd": (X, BIAS),
    "bias_gelu_fwd transposed": (randn(6, 5).t(), None),
    "bias_gelu_bwd": (randn(2, 5, 6), X, BIAS),
    "few_rows_linear": (randn(2, 6, grad=False), randn(5, 6, grad=False), randn(5, grad=False)),
    "cross_entropy_fwd": (randn(4, 9), TARGETS, -100),
    "cross_entropy_bwd": (randn(4), randn(4, 9), TARGETS, randn(4), -100),
    "linear_cross_entropy_fwd": (randn(4, 6), randn(9, 6), TARGETS, None, 8, -100, False, False),
    "linear_cross_entropy_fwd with gradients": (
        randn(4, 6, dtype=torch.bfloat16), randn(9, 6), TARGETS, randn(9, 6, dtype=torch.bfloat16), 8, -100, True, True
    ),
    "linear_cross_entropy_bwd": (
        randn(4), randn(4, 6), randn(9, 6), TARGETS, None, randn(4), None, None, None, 8, -100, True, False
    ),
    "linear_cross_entropy_bwd scaling": (
        torch.ones(4), randn(4, 6), randn(9, 6), TARGETS, None, randn(4), randn(4, 6), randn(9, 6), randn(0), 8, -100,
        True, True,
    ),
    "linear_logsumexp_fwd": (randn(4, 6), randn(9, 6), TARGETS, 2, 8, -100),
    "linear_logsumexp_bwd": (randn(4), randn(4), randn(4, 6), randn(9, 6), TARGETS, randn(4), 2, 8),
    "dropout": (X, 0.2, KEY, IDS, 1, 0),
    "rope": (QKV, *ops.rope_tables(torch.arange(5), 4), False),
    "grad_norm": ([randn(3, 4, grad=False), randn(5, grad=False)],),
    "adamw_": (*ADAMW_LISTS, [randn(3, 4, grad=False).bfloat16()], torch.tensor(0.5), 1e-3, 0.9, 0.95, 1e-8, 0.1, 2),
    "adamw_ without shadows": (*ADAMW_LISTS, [], None, 1e-3, 0.9, 0.95, 1e-8, 0.1, 1),
}
# The backward ops have no backward of their own, and are checked on tensors that need no gradient.
NO_GRAD = ("_bwd",)


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def run(function, tensors):
    """Outputs and the gradients of their sum."""
    outputs = as_tuple(function(*tensors))
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    if not leaves:
        return outputs, ()
    return outputs, torch.autograd.grad(sum(out.float().square().sum() for out in outputs), leaves)


@pytest.mark.parametrize("name", list(OPCHECKS))
def test_opcheck(name):
    op = getattr(G, name.split()[0]).default
    arguments = OPCHECKS[name]
    if name.split()[0].endswith(NO_GRAD):
        arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(op, arguments)


def test_opcheck_covers_every_op():
    registered = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("gptdist::")
    }
    assert registered == {name.split()[0] for name in OPCHECKS}


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph(name):
    torch.compiler.reset()
    function, tensors = cases()[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled, tensors), run(function, tensors), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing_inside_an_op(name):
    function, tensors = cases()[name]
    expected = as_tuple(function(*tensors))
    with torch.autocast("cpu", torch.bfloat16):
        got = as_tuple(function(*tensors))
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_inputs_with_fp32_parameters(name):
    function, tensors = cases(dtype=torch.bfloat16)[name]
    outputs, gradients = run(function, tensors)
    assert all(out.isfinite().all() for out in outputs)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in leaves]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_batch(name, dtype):
    function, tensors = cases(B=0, dtype=dtype)[name]
    _, gradients = run(function, tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_empty_sequence():
    assert ops.attention(torch.randn(2, 0, 2, 3, 4)).shape == (2, 0, 2, 1, 4)


@pytest.mark.parametrize("name", NAMES)
def test_no_grad(name):
    function, tensors = cases()[name]
    with torch.no_grad():
        outputs = as_tuple(function(*tensors))
    assert not any(out.requires_grad for out in outputs)


def test_a_changing_key_does_not_recompile():
    torch.compiler.reset()
    count = 0

    def backend(graph, inputs):
        nonlocal count
        count += 1
        return graph

    compiled = torch.compile(
        lambda x, key: ops.dropout(x, 0.2, key=key, sample_ids=IDS), fullgraph=True, backend=backend
    )
    x = torch.ones(2, 5, 6)
    outputs = [compiled(x, ops.dropout_key(0, step)) for step in range(3)]
    assert count == 1
    assert not torch.equal(outputs[0], outputs[1])
