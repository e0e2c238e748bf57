"""adamw_ and grad_norm on CUDA, run from their PTX, against float64; edges of chunks, determinism, memory traffic.

The machine checks at the same time that no access leaves a tensor, that nothing uninitialised is read, and that no two
threads race.
"""

import pytest
import torch

from gptdist import ops
from tests import adamw_cases, cuda_vm
from tests.adamw_cases import BF16, FP16, FP32

STEP_CHUNK, NORM_CHUNK = 8192, 16384  # csrc/cuda/kernels.h


@pytest.fixture(autouse=True)
def _poison():
    torch.manual_seed(0)
    with cuda_vm.poisoned_outputs():
        yield


def step(device, case, **options):
    """The case after a step, and the one launch that it took; the case is left as it was."""
    after = case.clone()
    with device.run(**options) as log:
        after.run()
    (launch,) = log.launches
    return after, launch


def norm(device, tensors, **options):
    """The norm and its two launches."""
    with device.run(**options) as log:
        result = ops.grad_norm(tensors)
    assert len(log.launches) == 2
    return result, log.launches


def traffic(launch):
    """(sectors, least sectors) of a launch's global loads and stores."""
    counters = launch.counters
    return tuple(counters[f"load_sectors{ideal}"] + counters[f"store_sectors{ideal}"] for ideal in ("", "_ideal"))


# adamw_


@pytest.mark.parametrize("shadow_dtypes", [(), (BF16,), (FP16, BF16)], ids=["none", "bf16", "mixed"])
@pytest.mark.parametrize("grad_dtypes", [(FP32,), (BF16,), (FP16,), (BF16, FP32, FP16)],
                         ids=["fp32", "bf16", "fp16", "mixed"])
def test_step_equals_float64(device, grad_dtypes, shadow_dtypes):
    shapes = [(3, 5), (), (0,), (1023,), (1024,), (16, 65), (7,)]
    case = adamw_cases.make(shapes, grad_dtypes, shadow_dtypes)
    after, _ = step(device, case)
    adamw_cases.check(case, after)


@pytest.mark.parametrize("size", [STEP_CHUNK - 1, STEP_CHUNK, STEP_CHUNK + 1, 2 * STEP_CHUNK + 1029])
def test_step_around_the_edges_of_chunks(device, size):
    case = adamw_cases.make([(5,), (size,), (2,)], (FP32, BF16), (BF16,))
    after, launch = step(device, case)
    adamw_cases.check(case, after)
    assert launch.grid == (2 + -(-size // STEP_CHUNK), 1, 1)


@pytest.mark.parametrize("options", [dict(weight_decay=0.0), dict(step=1), dict(step=10**6), dict(beta1=0.0),
                                     dict(beta2=0.999, step=2), dict(eps=1e-2), dict(scaled=False)], ids=str)
def test_step_options(device, options):
    case = adamw_cases.make([(77,), (130,)], shadow_dtypes=(BF16,), **options)
    adamw_cases.check(case, step(device, case)[0])


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_tensors(device, offset):
    case = adamw_cases.make([(9,), (1030,), (STEP_CHUNK + 3,)], (BF16, FP32), (BF16,), offset=offset)
    assert case.params[0].data_ptr() % 16 == 4 * offset
    adamw_cases.check(case, step(device, case)[0])


@pytest.mark.parametrize("name", ["params", "grads", "exp_avg", "exp_avg_sq", "shadows"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_one_misaligned_list_is_enough(device, name, dtype):
    case = adamw_cases.make([(1030,)], (dtype,), (BF16,))
    moved = adamw_cases.make([(1030,)], (dtype,), (BF16,), offset=1)
    getattr(case, name)[0] = getattr(moved, name)[0]
    adamw_cases.check(case, step(device, case)[0])


def test_a_thousand_small_tensors_in_one_launch(device):
    case = adamw_cases.make([(i % 7, 3) for i in range(1000)], (BF16, FP32))
    after, launch = step(device, case)
    adamw_cases.check(case, after)
    assert launch.grid == (sum(i % 7 > 0 for i in range(1000)), 1, 1)


def test_neighbours_of_tensors_are_left_alone(device):
    """The machine's view of the tensors, in values: views of one buffer, each with a gap before and after it."""
    memory = torch.full((4, 300), 7.0)
    views = [memory[i, 5:5 + 263] for i in range(3)]
    grad = torch.randn(263)
    with device.run():
        ops.adamw_([views[0]], [grad], [views[1]], [views[2]], **adamw_cases.OPTIONS)
    assert (memory[:, :5] == 7).all()
    assert (memory[:, 268:] == 7).all()
    assert (memory[3] == 7).all()
    assert (memory[:3, 5:268] != 7).all()


def test_step_spreads_nan_and_inf_as_the_reference(device, monkeypatch):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.0])
    p, g, m, v = (t.clone() for t in torch.cartesian_prod(special, special, special, special.abs()).unbind(1))
    case = adamw_cases.Case([p], [g], [m], [v], [p.to(BF16)], None, adamw_cases.OPTIONS)
    after, _ = step(device, case)
    monkeypatch.setenv("GPTDIST_OPS", "reference")
    case.run()
    for got, wanted in zip(after.outputs(), case.outputs(), strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)


def test_step_gives_the_same_bits_in_every_schedule(device):
    case = adamw_cases.make([(100,), (STEP_CHUNK + 5,), (2000,)], (BF16, FP32), (BF16,))
    first = step(device, case, seed=0)[0].outputs()
    for seed in (1, 2):
        other = step(device, case, seed=seed)[0].outputs()
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("shadow_dtypes", [(), (BF16,)], ids=["none", "bf16"])
@pytest.mark.parametrize("grad_dtype", [FP32, BF16])
def test_step_moves_no_sector_more_than_its_bytes_need(device, grad_dtype, shadow_dtypes):
    sizes = [STEP_CHUNK * 2, 1024, 64]
    _, launch = step(device, adamw_cases.make([(size,) for size in sizes], (grad_dtype,), shadow_dtypes))
    sectors, least = traffic(launch)
    assert sectors == least
    bytes_each = 24 + (4 if grad_dtype == FP32 else 2) + 2 * len(shadow_dtypes)
    table = launch.grid[0] * 8 * 10  # sectors of the table, which every warp of a block reads
    assert sum(sizes) * bytes_each <= 32 * sectors <= sum(sizes) * bytes_each + 32 * table


# grad_norm

NORM_SIZES = [(3, 5), (), (0,), (1,), (4096,), (4095,), (16, 65), (NORM_CHUNK - 1,), (NORM_CHUNK + 8,)]


def exact_norm(tensors):
    return sum(x.double().square().sum() for x in tensors).sqrt()


@pytest.mark.parametrize("dtypes", [(FP32,), (BF16,), (FP16,), (BF16, FP32, FP16)],
                         ids=["fp32", "bf16", "fp16", "mixed"])
@pytest.mark.parametrize("offset", [0, 1])
def test_norm_equals_float64(device, dtypes, offset):
    tensors = [adamw_cases.placed(shape, dtypes[i % len(dtypes)], offset).copy_(torch.randn(shape))
               for i, shape in enumerate(NORM_SIZES)]
    result, launches = norm(device, tensors)
    assert result.dtype == FP32
    assert result.shape == ()
    assert launches[0].grid == (9, 1, 1)
    torch.testing.assert_close(result.double(), exact_norm(tensors), rtol=2e-7, atol=0)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 1023, 1024, 1025, 4097, NORM_CHUNK, NORM_CHUNK + 1])
def test_norm_counts_every_element_once(device, size):
    x = torch.arange(size) % 97 + 1.0
    result, _ = norm(device, [x])
    torch.testing.assert_close(result.double(), exact_norm([x]), rtol=1e-7, atol=0)


def test_norm_of_many_tensors(device):
    tensors = [torch.randn(i % 5, 3).to(FP32 if i % 2 else BF16) for i in range(1500)]
    result, launches = norm(device, tensors)
    assert launches[0].grid == (1200, 1, 1)
    torch.testing.assert_close(result.double(), exact_norm(tensors), rtol=2e-7, atol=0)


def test_norm_does_not_depend_on_grouping_or_schedule(device):
    x = torch.randn(5 * NORM_CHUNK)
    results = [norm(device, group, seed=seed)[0].item()
               for seed, group in enumerate([[x], [x], list(x.split(4096)), list(x.split(NORM_CHUNK))])]
    assert len(set(results)) == 1


def test_norm_of_nothing_nan_and_inf(device):
    with device.run() as log:
        assert ops.grad_norm([torch.ones(0), torch.ones(0, 3)]).item() == 0.0
    assert log.launches == []
    assert norm(device, [torch.ones(3), torch.tensor([float("nan")])])[0].isnan()
    assert norm(device, [torch.tensor([1.0, -float("inf")])])[0].isinf()
    x = torch.randn(30, 40)
    torch.testing.assert_close(norm(device, [x.t()])[0], x.norm())


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_norm_moves_no_sector_more_than_its_bytes_need(device, dtype):
    sizes = [NORM_CHUNK * 2, 1024, 64]
    _, (launch, fold) = norm(device, [torch.randn(size).to(dtype) for size in sizes])
    for sectors, least in (traffic(launch), traffic(fold)):
        assert sectors == least
    moved = sum(sizes) * dtype.itemsize
    assert moved <= 32 * traffic(launch)[0] <= moved + 32 * launch.grid[0] * 8 * 10


# the optimizer


def test_adamw_steps_by_the_kernels(device, monkeypatch):
    from gptdist.config import OptimConfig
    from gptdist.optim.adamw import build_adamw

    def three_steps():
        generator = torch.Generator().manual_seed(1)
        shapes = [(33, 5), (70,), (8, 8)]
        parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = build_adamw([(str(i), p) for i, p in enumerate(parameters)], OptimConfig())
        for _ in range(3):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator)
            scale = (1.0 / ops.grad_norm([p.grad for p in parameters])).clamp(max=1.0)
            optimizer.step(grad_scale=scale)
        return [p.detach() for p in parameters]

    with device.run() as log:
        got = three_steps()
    assert len(log.launches) == 3 * (2 + 2)  # two of the norm, one for each decay group
    monkeypatch.setenv("GPTDIST_OPS", "reference")
    for a, b in zip(got, three_steps(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
