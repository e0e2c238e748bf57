"""The PTX machine's lane-wise instructions against models written from the PTX manual."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.ptx_text import evaluate

EXAMPLES = settings(max_examples=12, deadline=None)
INTEGER_TYPES = {
    f"{s}{bits}": np.dtype(f"{'int' if s == 's' else 'uint'}{bits}") for s in "su" for bits in (16, 32, 64)
}


def lanes(dtype):
    """32 values of any bits, edge cases often."""
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return arrays(f"uint{8 * dtype.itemsize}", 32).map(lambda bits: bits.view(dtype))
    info = np.iinfo(dtype)
    edges = st.sampled_from(
        [v for v in (0, 1, -1, 2, 31, 32, 33, info.max, info.min, info.max - 1) if info.min <= v <= info.max]
    )
    return arrays(dtype, 32, elements=st.integers(int(info.min), int(info.max)) | edges)


def wrap(value: int, dtype) -> int:
    dtype = np.dtype(dtype)
    bits = 8 * dtype.itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if dtype.kind == "i" and value >> (bits - 1) else value


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def check(cases, models, **inputs):
    """Every case equals its model, lane by lane; a model takes the inputs' Python values."""
    results = evaluate(cases, **inputs)
    for (instruction, dtype), model, result in zip(cases, models, results, strict=True):
        values = [v.tolist() for v in inputs.values()]
        expected = [model(*row) for row in zip(*values, strict=True)]
        if np.dtype(dtype).kind in "iu":
            expected = [wrap(int(e), dtype) for e in expected]
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(result, np.array(expected, dtype), err_msg=instruction)


@pytest.mark.parametrize("name", INTEGER_TYPES)
@EXAMPLES
@given(data=st.data())
def test_integer_arithmetic(name, data):
    dtype = INTEGER_TYPES[name]
    bits = 8 * dtype.itemsize
    a, b, c = (data.draw(lanes(dtype)) for _ in range(3))
    b[b == 0] = 1
    cases = {
        "add": lambda a, b, c: a + b,
        "sub": lambda a, b, c: a - b,
        "mul.lo": lambda a, b, c: a * b,
        "mul.hi": lambda a, b, c: a * b >> bits,
        "div": lambda a, b, c: quotient(a, b),
        "rem": lambda a, b, c: a - quotient(a, b) * b,
        "min": lambda a, b, c: min(a, b),
        "max": lambda a, b, c: max(a, b),
    }
    texts = [(f"{op}.{name} $, %a, %b", dtype) for op in cases]
    models = list(cases.values())
    three = {
        "mad.lo": lambda a, b, c: a * b + c,
        "mad.hi": lambda a, b, c: (a * b >> bits) + c,
        "sad": lambda a, b, c: abs(a - b) + c,
    }
    texts += [(f"{op}.{name} $, %a, %b, %c", dtype) for op in three]
    models += list(three.values())
    if dtype.kind == "i":
        texts += [(f"abs.{name} $, %a", dtype), (f"neg.{name} $, %a", dtype)]
        models += [lambda a, b, c: abs(a), lambda a, b, c: -a]
    if bits < 64:
        wide = np.dtype(f"{'int' if dtype.kind == 'i' else 'uint'}{2 * bits}")
        texts.append((f"mul.wide.{name} $, %a, %b", wide))
        models.append(lambda a, b, c: a * b)
    comparisons = {"eq": "__eq__", "ne": "__ne__", "lt": "__lt__", "le": "__le__", "gt": "__gt__", "ge": "__ge__"}
    for op, method in comparisons.items():
        texts.append((f"setp.{op}.{name} $, %a, %b", bool))
        models.append(lambda a, b, c, method=method: getattr(a, method)(b))
    check(texts, models, a=a, b=b, c=c)


@pytest.mark.parametrize("bits", [16, 32, 64])
@EXAMPLES
@given(data=st.data())
def test_bits_and_shifts(bits, data):
    unsigned, signed = np.dtype(f"uint{bits}"), np.dtype(f"int{bits}")
    a, b = data.draw(lanes(unsigned)), data.draw(lanes(unsigned))
    amount = data.draw(arrays(np.uint32, 32, elements=st.integers(0, 80)))
    full = (1 << bits) - 1

    def signed_shift(a, b, n):
        return wrap(a, signed) >> min(n, bits - 1)

    texts = [(f"{op}.b{bits} $, %a, %b", unsigned) for op in ("and", "or", "xor")]
    models = [lambda a, b, n: a & b, lambda a, b, n: a | b, lambda a, b, n: a ^ b]
    texts += [(f"not.b{bits} $, %a", unsigned), (f"cnot.b{bits} $, %a", unsigned)]
    models += [lambda a, b, n: a ^ full, lambda a, b, n: int(a == 0)]
    texts += [(f"{op} $, %a, %n", unsigned) for op in (f"shl.b{bits}", f"shr.b{bits}", f"shr.u{bits}", f"shr.s{bits}")]
    models += [lambda a, b, n: a << n, lambda a, b, n: a >> n, lambda a, b, n: a >> n, signed_shift]
    if bits >= 32:
        texts += [(f"{op}.b{bits} $, %a", np.uint32) for op in ("popc", "clz")] + [(f"brev.b{bits} $, %a", unsigned)]
        models += [
            lambda a, b, n: a.bit_count(),
            lambda a, b, n: bits - a.bit_length(),
            lambda a, b, n: int(f"{a:0{bits}b}"[::-1], 2),
        ]
        for sign in "us":
            texts += [(f"bfind{shift}.{sign}{bits} $, %a", np.uint32) for shift in ("", ".shiftamt")]

            def find(a, b, n, sign=sign):
                a = a ^ full if sign == "s" and a >> (bits - 1) else a
                return a.bit_length() - 1

            models += [find, lambda a, b, n, find=find: -1 if find(a, b, n) < 0 else bits - 1 - find(a, b, n)]
    check(texts, models, a=a, b=b, n=amount)


def extract(value: int, bits: int, position: int, length: int, signed: bool) -> int:
    """bfe, as the manual's loop writes it."""
    position, length, last = position & 255, length & 255, bits - 1
    sign = 0
    if signed and length:
        sign = value >> min(position + length - 1, last) & 1
    result = 0
    for i in range(last + 1):
        bit = value >> (position + i) & 1 if i < length and position + i <= last else sign
        result |= bit << i
    return result


def insert(a: int, b: int, bits: int, position: int, length: int) -> int:
    """bfi, as the manual's loop writes it."""
    position, length, result, i = position & 255, length & 255, b, 0
    while i < length and position + i < bits:
        result = result & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
        i += 1
    return result


@EXAMPLES
@given(
    a=lanes(np.uint32),
    b=lanes(np.uint32),
    wide=lanes(np.uint64),
    position=arrays(np.uint32, 32, elements=st.integers(0, 300)),
    length=arrays(np.uint32, 32, elements=st.integers(0, 70)),
    table=st.integers(0, 255),
)
def test_bit_fields(a, b, wide, position, length, table):
    def lop3(a, b, w, p, n):
        bits = 0
        for i in range(32):
            bits |= (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | p >> i & 1) & 1) << i
        return bits

    texts = [
        ("bfe.u32 $, %a, %p, %n", np.uint32),
        ("bfe.s32 $, %a, %p, %n", np.uint32),
        ("bfe.u64 $, %w, %p, %n", np.uint64),
        ("bfe.s64 $, %w, %p, %n", np.uint64),
        ("bfi.b32 $, %a, %b, %p, %n", np.uint32),
        ("bfi.b64 $, %w, %w, %p, %n", np.uint64),
        (f"lop3.b32 $, %a, %b, %p, {table}", np.uint32),
        ("shf.l.wrap.b32 $, %a, %b, %n", np.uint32),
        ("shf.r.wrap.b32 $, %a, %b, %n", np.uint32),
        ("shf.l.clamp.b32 $, %a, %b, %n", np.uint32),
        ("shf.r.clamp.b32 $, %a, %b, %n", np.uint32),
    ]
    models = [
        lambda a, b, w, p, n: extract(a, 32, p, n, False),
        lambda a, b, w, p, n: extract(a, 32, p, n, True),
        lambda a, b, w, p, n: extract(w, 64, p, n, False),
        lambda a, b, w, p, n: extract(w, 64, p, n, True),
        lambda a, b, w, p, n: insert(a, b, 32, p, n),
        lambda a, b, w, p, n: insert(w, w, 64, p, n),
        lop3,
        lambda a, b, w, p, n: (b << 32 | a) << (n & 31) >> 32,
        lambda a, b, w, p, n: (b << 32 | a) >> (n & 31),
        lambda a, b, w, p, n: (b << 32 | a) << min(n, 32) >> 32,
        lambda a, b, w, p, n: (b << 32 | a) >> min(n, 32),
    ]
    check(texts, models, a=a, b=b, w=wide, p=position, n=length)


def permute(a: int, b: int, selector: int) -> int:
    source, result = (b << 32 | a).to_bytes(8, "little"), 0
    for i in range(4):
        pick = selector >> (4 * i) & 15
        byte = source[pick & 7]
        result |= (255 * (byte >> 7) if pick & 8 else byte) << (8 * i)
    return result


@EXAMPLES
@given(a=lanes(np.uint32), b=lanes(np.uint32), c=lanes(np.uint32))
def test_permute_and_dot_products(a, b, c):
    def bytes_of(value, signed):
        return [int.from_bytes([byte], signed=signed) for byte in value.to_bytes(4, "little")]

    texts, models = [("prmt.b32 $, %a, %b, %c", np.uint32)], [permute]
    modes = {
        "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
        "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
        "rc8": (0, 0x1111, 0x2222, 0x3333),
        "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
        "ecr": (0, 0x1110, 0x2210, 0x3210),
        "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
    }
    for mode, selectors in modes.items():
        texts.append((f"prmt.b32.{mode} $, %a, %b, %c", np.uint32))
        models.append(lambda a, b, c, selectors=selectors: permute(a, b, selectors[c & 3]))
    for sign_a in "us":
        for sign_b in "us":
            texts.append((f"dp4a.{sign_a}32.{sign_b}32 $, %a, %b, %c", np.uint32))
            models.append(
                lambda a, b, c, s=sign_a, t=sign_b: (
                    c + sum(x * y for x, y in zip(bytes_of(a, s == "s"), bytes_of(b, t == "s"), strict=True))
                )
            )
    check(texts, models, a=a, b=b, c=c)


def test_carry_chains():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 2**64, 32, np.uint64) for _ in range(2))
    low = lambda v: (v & np.uint64(0xFFFFFFFF)).astype(np.uint32)  # noqa: E731
    high = lambda v: (v >> np.uint64(32)).astype(np.uint32)  # noqa: E731
    add = "add.cc.u32 %r1, %al, %bl; addc.u32 %r2, %ah, %bh; mov.b64 $, {%r1, %r2}"
    sub = "sub.cc.u32 %r1, %al, %bl; subc.u32 %r2, %ah, %bh; mov.b64 $, {%r1, %r2}"
    mad = "mad.lo.cc.u32 %r1, %al, %bl, %ah; madc.hi.u32 %r2, %al, %bl, %bh; mov.b64 $, {%r1, %r2}"
    results = evaluate(
        [(add, np.uint64), (sub, np.uint64), (mad, np.uint64)], al=low(a), ah=high(a), bl=low(b), bh=high(b)
    )
    product = low(a).astype(np.uint64) * low(b)
    for result, expected in zip(
        results, (a + b, a - b, product + high(a) + (high(b).astype(np.uint64) << np.uint64(32))), strict=True
    ):
        np.testing.assert_array_equal(result, expected)


def test_selection_and_predicates():
    a, b = np.arange(32, dtype=np.int32) - 16, np.arange(32, dtype=np.int32)[::-1].copy() - 10
    texts = [
        ("setp.lt.s32 %p0, %a, %b; selp.b32 $, %a, %b, %p0", np.int32),
        ("slct.s32.s32 $, %a, %b, %a", np.int32),
        ("setp.lt.s32 %p0, %a, 0; setp.gt.and.s32 $, %b, 0, %p0", bool),
        ("setp.lt.s32 %p0, %a, 0; setp.gt.or.s32 $, %b, 0, !%p0", bool),
        ("setp.lt.s32 %p0, %a, 0; setp.gt.xor.s32 $|%p1, %b, 0, %p0", bool),
        ("setp.lt.s32 %p0, %a, 0; setp.gt.xor.s32 %p1|$, %b, 0, %p0", bool),
        ("setp.lt.s32 %p0|$, %a, %b", bool),
        ("set.lt.u32.s32 $, %a, %b", np.uint32),
        ("set.lt.f32.s32 $, %a, %b", np.float32),
        ("setp.lt.s32 %p0, %a, 0; setp.lt.s32 %p1, %b, 0; and.pred %p2, %p0, %p1; not.pred $, %p2", bool),
        ("mov.b32 {%h2, %h3}, %a; mov.b32 $, {%h3, %h2}", np.uint32),
        ("mov.b32 $, 5; setp.lt.s32 %p0, %a, 0; @%p0 mov.b32 $, %b; @!%p0 add.s32 $, $, 1", np.int32),
    ]
    bits = a.view(np.uint32)
    expected = [
        np.minimum(a, b),
        np.where(a >= 0, a, b),
        (b > 0) & (a < 0),
        (b > 0) | (a >= 0),
        (b > 0) ^ (a < 0),
        (b <= 0) ^ (a < 0),
        a >= b,
        np.where(a < b, 0xFFFFFFFF, 0),
        np.where(a < b, 1.0, 0.0),
        ~((a < 0) & (b < 0)),
        bits >> 16 | bits << 16,
        np.where(a < 0, b, 6),
    ]
    for (text, dtype), result, want in zip(texts, evaluate(texts, a=a, b=b), expected, strict=True):
        np.testing.assert_array_equal(result, want.astype(dtype), err_msg=text)


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1.5,
    math.inf,
    -math.inf,
    math.nan,
    1e-45,
    -1e-45,
    1.1754944e-38,
    3.4028235e38,
    5.9e-39,
    0.5,
    -2.5,
    65504.0,
]


def floats(dtype=np.float32):
    elements = st.floats(width=np.dtype(dtype).itemsize * 8) | st.sampled_from(
        [v for v in SPECIAL if dtype != np.float16 or abs(v) < 65505 or not math.isfinite(v)]
    )
    if dtype == np.float16:
        elements = st.floats(width=16)
    return arrays(dtype, 32, elements=elements)


def flush(x):
    return np.where(np.abs(x) < np.float32(1.1754944e-38), np.copysign(np.float32(0), x), x).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(a=floats(), b=floats(), c=floats())
def test_float32(a, b, c):
    with np.errstate(all="ignore"):
        double = a.astype(np.float64) * b  # exact
        fused = [
            float(Fraction(x) + Fraction(y)) if math.isfinite(x) and math.isfinite(y) else x + y
            for x, y in zip(double.tolist(), c.tolist(), strict=True)
        ]
        number = ~(np.isnan(a) | np.isnan(b))
        expected = {
            "add.f32 $, %a, %b": a + b,
            "sub.rn.f32 $, %a, %b": a - b,
            "mul.f32 $, %a, %b": a * b,
            "div.rn.f32 $, %a, %b": a / b,
            "add.ftz.f32 $, %a, %b": flush(flush(a) + flush(b)),
            "mul.ftz.f32 $, %a, %b": flush(flush(a) * flush(b)),
            "min.f32 $, %a, %b": np.fmin(a, b),
            "max.f32 $, %a, %b": np.fmax(a, b),
            "min.NaN.f32 $, %a, %b": np.minimum(a, b),
            "abs.f32 $, %a": np.abs(a),
            "neg.f32 $, %a": -a,
            "rcp.rn.f32 $, %a": np.float32(1) / a,
            "sqrt.rn.f32 $, %a": np.sqrt(a),
            "copysign.f32 $, %a, %b": np.copysign(b, a),
            "add.sat.f32 $, %a, %b": np.nan_to_num(np.clip(a + b, 0, 1)),
        }
        compared = {
            "lt": (a < b) & number,
            "geu": ~(a < b),
            "eq": a == b,
            "neu": a != b,
            "ne": (a != b) & number,
            "gtu": ~(a <= b),
            "num": number,
            "nan": ~number,
        }
        texts = [(text, np.float32) for text in expected] + [(f"setp.{op}.f32 $, %a, %b", bool) for op in compared]
        texts += [
            ("testp.subnormal.f32 $, %a", bool),
            ("testp.finite.f32 $, %a", bool),
            ("fma.rn.f32 $, %a, %b, %c", np.float32),
        ]
        wanted = [
            *expected.values(),
            *compared.values(),
            (a != 0) & (np.abs(a) < np.float32(1.1754944e-38)),
            np.isfinite(a),
        ]
        results = evaluate(texts, a=a, b=b, c=c)
        for (text, _), result, want in zip(texts, results, wanted, strict=False):
            np.testing.assert_array_equal(result, want, err_msg=text)  # NaN payloads are not compared
        for result, exact, x in zip(results[-1].tolist(), fused, double.tolist(), strict=True):
            if math.isfinite(exact) and math.isfinite(x):
                assert (
                    abs(Fraction(result) - Fraction(exact)) <= abs(Fraction(exact)) / 2**24 + Fraction(1, 2**150)
                    if math.isfinite(result)
                    else abs(exact) > 3.4e38
                )


def rounded_sum(x: float, y: float, direction: int) -> float:
    """x + y in fp32, rounded down (-1), up (1) or to zero (0)."""
    exact = Fraction(x) + Fraction(y)
    near = np.float32(float(exact))
    if direction == 0:
        direction = -1 if exact > 0 else 1
    while Fraction(float(near)) > exact and direction < 0:
        near = np.nextafter(near, np.float32(-np.inf))
    while Fraction(float(near)) < exact and direction > 0:
        near = np.nextafter(near, np.float32(np.inf))
    return float(near)


def test_rounding_directions():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal(32).astype(np.float32), (rng.standard_normal(32) * 1e-6).astype(np.float32)
    results = evaluate([(f"add.{d}.f32 $, %a, %b", np.float32) for d in ("rz", "rm", "rp")], a=a, b=b)
    for result, direction in zip(results, (0, -1, 1), strict=True):
        np.testing.assert_array_equal(
            result, [rounded_sum(x, y, direction) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        )


def test_approximate_functions():
    x = np.linspace(-20, 20, 32).astype(np.float32)
    positive = np.abs(x) + np.float32(0.1)
    with np.errstate(all="ignore"):
        exact = {
            "ex2.approx.ftz.f32 $, %x": np.exp2(x.astype(np.float64)),
            "tanh.approx.f32 $, %x": np.tanh(x.astype(np.float64)),
            "sin.approx.f32 $, %x": np.sin(x.astype(np.float64)),
            "cos.approx.f32 $, %x": np.cos(x.astype(np.float64)),
            "lg2.approx.f32 $, %y": np.log2(positive.astype(np.float64)),
            "rsqrt.approx.f32 $, %y": positive.astype(np.float64) ** -0.5,
            "rcp.approx.ftz.f32 $, %y": 1 / positive.astype(np.float64),
            "sqrt.approx.f32 $, %y": np.sqrt(positive.astype(np.float64)),
            "div.approx.f32 $, %x, %y": x.astype(np.float64) / positive,
            "div.full.f32 $, %x, %y": x.astype(np.float64) / positive,
        }
    for text, result, want in zip(
        exact, evaluate([(t, np.float32) for t in exact], x=x, y=positive), exact.values(), strict=True
    ):
        np.testing.assert_allclose(result, want, rtol=1.2e-7, err_msg=text)
    edges = np.array(
        [0, -0.0, 200, -200, np.inf, -np.inf, np.nan, 127.999, -149, -126.5, 1e-30, 1e-10] + [0.03] * 20, np.float32
    )
    ex2, flushed, tanh = evaluate(
        [
            ("ex2.approx.f32 $, %x", np.float32),
            ("ex2.approx.ftz.f32 $, %x", np.float32),
            ("tanh.approx.f32 $, %x", np.float32),
        ],
        x=edges,
    )
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(ex2, np.exp2(edges.astype(np.float64)).astype(np.float32))
        np.testing.assert_array_equal(flushed, flush(np.exp2(edges.astype(np.float64)).astype(np.float32)))
        np.testing.assert_allclose(tanh, np.tanh(edges.astype(np.float64)), rtol=1e-7)


@EXAMPLES
@given(a=arrays(np.float64, 32, elements=st.floats()), b=arrays(np.float64, 32, elements=st.floats()))
def test_float64(a, b):
    with np.errstate(all="ignore"):
        expected = {
            "add.f64 $, %a, %b": a + b,
            "sub.f64 $, %a, %b": a - b,
            "mul.f64 $, %a, %b": a * b,
            "div.rn.f64 $, %a, %b": a / b,
            "min.f64 $, %a, %b": np.fmin(a, b),
            "sqrt.rn.f64 $, %a": np.sqrt(a),
            "neg.f64 $, %a": -a,
        }
    for text, result, want in zip(
        expected, evaluate([(t, np.float64) for t in expected], a=a, b=b), expected.values(), strict=True
    ):
        np.testing.assert_array_equal(result, want, err_msg=text)


def exact_half(dtype, values) -> np.ndarray:
    """Exact numbers (Fraction, or float for what is not finite) to 16-bit floats, rounded once to nearest even."""
    digits, lowest, largest = (
        (11, -24, Fraction(65504)) if dtype == torch.float16 else (8, -133, Fraction(2**128 - 2**120))
    )
    result = []
    for value in values:
        if not isinstance(value, Fraction) or value == 0:
            result.append(float(value))
            continue
        exponent = max(math.floor(math.log2(abs(value))) - digits + 1, lowest)
        if abs(value) >= Fraction(2) ** (exponent + digits):
            exponent += 1
        elif abs(value) < Fraction(2) ** (exponent + digits - 1) and exponent > lowest:
            exponent -= 1
        unit = Fraction(2) ** exponent
        near = round(value / unit) * unit
        result.append(math.copysign(math.inf, near) if abs(near) > largest else float(near))
    return np.array(result)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@EXAMPLES
@given(bits=arrays(np.uint16, (3, 64)))
def test_half_arithmetic(dtype, bits):
    """Single values and pairs: one rounding of the exact result."""
    name = "f16" if dtype == torch.float16 else "bf16"
    values = torch.from_numpy(bits.view(np.int16)).view(dtype).double().numpy()

    def exact(operation):
        rows = []
        for row in zip(*values[: operation.__code__.co_argcount].tolist(), strict=True):
            finite = all(math.isfinite(v) for v in row)
            rows.append(operation(*(Fraction(v) for v in row)) if finite else operation(*row))
        return exact_half(dtype, rows)

    def back(words):
        return torch.from_numpy(words.view(np.int16).copy()).view(dtype).double().numpy()

    a, b, c = (row.view(np.uint32).copy() for row in bits)
    operations = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "fma.rn": lambda a, b, c: a * b + c,
    }
    third = {"fma.rn": ", %c"}
    pair = [(f"{op}.{name}x2 $, %a, %b{third.get(op, '')}", np.uint32) for op in operations]
    single = [(f"{op}.{name} $, %x, %y{third.get(op, '').replace('c', 'z')}", np.uint16) for op in operations]
    halves = {"x": bits[0, ::2].copy(), "y": bits[1, ::2].copy(), "z": bits[2, ::2].copy()}
    results = evaluate(pair + single, a=a, b=b, c=c, **halves)
    for (text, _), result, operation in zip(pair + single, results, list(operations.values()) * 2, strict=True):
        want = exact(operation)
        got = back(result)
        np.testing.assert_array_equal(got, want if len(got) == 64 else want[::2], err_msg=text)
    extremes = {"min": np.fmin, "max": np.fmax, "min.NaN": np.minimum, "max.NaN": np.maximum}
    for (op, model), result in zip(
        extremes.items(), evaluate([(f"{op}.{name}x2 $, %a, %b", np.uint32) for op in extremes], a=a, b=b), strict=True
    ):
        np.testing.assert_array_equal(back(result), model(values[0], values[1]), err_msg=op)


def test_half_comparisons_and_functions():
    x = torch.tensor([1.0, -2.0, math.nan, 0.5] * 16).half()
    y = torch.tensor([1.0, 3.0, 1.0, -0.5] * 16).half()
    a, b = (t.view(torch.int16).numpy().view(np.uint32).copy() for t in (x, y))
    texts = [
        ("setp.lt.f16x2 $|%p1, %a, %b", bool),
        ("setp.lt.f16x2 %p1|$, %a, %b", bool),
        ("set.eq.f16x2.f16x2 $, %a, %b", np.uint32),
        ("ex2.approx.f16x2 $, %a", np.uint32),
        ("tanh.approx.f16x2 $, %a", np.uint32),
        ("neg.f16x2 $, %a", np.uint32),
    ]
    low, high, equal, ex2, tanh, negated = evaluate(texts, a=a, b=b)
    np.testing.assert_array_equal(low, (x < y)[::2])
    np.testing.assert_array_equal(high, (x < y)[1::2])
    half = lambda words: torch.from_numpy(words.view(np.float16).copy())  # noqa: E731
    torch.testing.assert_close(half(equal), (x == y).half())
    torch.testing.assert_close(half(ex2), x.double().exp2().half(), equal_nan=True)
    torch.testing.assert_close(half(tanh), x.double().tanh().half(), equal_nan=True)
    torch.testing.assert_close(half(negated), -x, equal_nan=True)


@pytest.mark.parametrize("source", [*INTEGER_TYPES])
@EXAMPLES
@given(data=st.data())
def test_convert_integers(source, data):
    a = data.draw(lanes(INTEGER_TYPES[source]))
    texts, models = [], []
    for target, dtype in INTEGER_TYPES.items():
        texts.append((f"cvt.{target}.{source} $, %a", dtype))
        models.append(lambda a: a)
        info = np.iinfo(dtype)
        texts.append((f"cvt.sat.{target}.{source} $, %a", dtype))
        models.append(lambda a, info=info: min(max(a, int(info.min)), int(info.max)))
    texts += [(f"cvt.rn.f32.{source} $, %a", np.float32), (f"cvt.rn.f64.{source} $, %a", np.float64)]
    models += [lambda a: np.float32(np.array(a, INTEGER_TYPES[source])), float]
    check(texts, models, a=a)


def test_convert_bytes_and_wider_registers():
    a = (np.arange(32, dtype=np.int32) * 0x01010133 - 77).astype(np.int32)
    texts = [
        ("cvt.u32.u8 $, %a", np.uint32),
        ("cvt.s32.s8 $, %a", np.int32),
        ("cvt.s32.s16 $, %a", np.int32),
        ("cvt.s64.s8 $, %a", np.int64),
        ("cvt.u8.u32 $, %a", np.uint16),
        ("cvt.s8.s32 $, %a", np.int16),
        ("cvt.sat.u8.s32 $, %a", np.uint16),
    ]
    expected = [
        a & 255,
        a.astype(np.int8),
        a.astype(np.int16),
        a.astype(np.int8),
        a & 255,
        a.astype(np.int8),
        np.clip(a, 0, 255),
    ]
    for (text, dtype), result, want in zip(texts, evaluate(texts, a=a), expected, strict=True):
        np.testing.assert_array_equal(result, want.astype(dtype), err_msg=text)


@settings(max_examples=30, deadline=None)
@given(a=floats())
def test_convert_from_float32(a):
    rounders = {"rni": np.round, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    texts, expected = [], []
    with np.errstate(all="ignore"):
        for name, rounder in rounders.items():
            texts.append((f"cvt.{name}.f32.f32 $, %a", np.float32))
            expected.append(rounder(a))
            for target, dtype in INTEGER_TYPES.items():
                info = np.iinfo(dtype)
                limits = [
                    min(max(int(v), int(info.min)), int(info.max))
                    if math.isfinite(v)
                    else int(info.max if v > 0 else info.min)
                    for v in np.nan_to_num(rounder(a), nan=0.0, posinf=np.inf, neginf=-np.inf).tolist()
                ]
                nan = 1 << 63 if dtype.itemsize == 8 else 0
                texts.append((f"cvt.{name}.{target}.f32 $, %a", dtype))
                expected.append(
                    np.array(
                        [
                            wrap(nan, dtype) if math.isnan(v) else limit
                            for v, limit in zip(a.tolist(), limits, strict=True)
                        ],
                        dtype,
                    )
                )
        tensor = torch.from_numpy(a)
        texts += [
            ("cvt.rn.f16.f32 $, %a", np.float16),
            ("cvt.f64.f32 $, %a", np.float64),
            ("cvt.sat.f32.f32 $, %a", np.float32),
            ("cvt.ftz.f32.f32 $, %a", np.float32),
        ]
        expected += [a.astype(np.float16), a.astype(np.float64), np.nan_to_num(np.clip(a, 0, 1)), flush(a)]
    texts += [
        ("cvt.rn.bf16.f32 $, %a", np.uint16),
        ("cvt.rn.bf16x2.f32 $, %a, 0f3F800000", np.uint32),
        ("cvt.rn.f16x2.f32 $, 0f3F800000, %a", np.uint32),
    ]
    results = evaluate(texts, a=a)
    for (text, _), result, want in zip(texts, results, expected, strict=False):
        np.testing.assert_array_equal(result, want, err_msg=text)
    bf16, bf16_pair, half_pair = results[-3:]
    number = ~np.isnan(a)
    np.testing.assert_array_equal(bf16[number], tensor.bfloat16().view(torch.int16).numpy().view(np.uint16)[number])
    assert (bf16[~number] == 0x7FFF).all()
    np.testing.assert_array_equal(bf16_pair, bf16.astype(np.uint32) << 16 | 0x3F80)
    np.testing.assert_array_equal((half_pair & 0xFFFF).astype(np.uint16).view(np.float16), expected[-4])
    assert (half_pair >> 16 == 0x3C00).all()


@pytest.mark.parametrize("target", ["f16", "bf16"])
@EXAMPLES
@given(a=floats())
def test_convert_in_every_direction(target, a):
    """Directed rounding brackets the value, and the two sides are neighbours."""
    dtype = torch.float16 if target == "f16" else torch.bfloat16
    a = a[np.isfinite(a)]
    a = np.resize(a if len(a) else np.float32([1.1]), 32).astype(np.float32)
    down, up, zero = (
        torch.from_numpy(r.view(np.int16)).view(dtype).double().numpy()
        for r in evaluate([(f"cvt.{m}.{target}.f32 $, %a", np.uint16) for m in ("rm", "rp", "rz")], a=a)
    )
    assert (down <= a).all()
    assert (up >= a).all()
    np.testing.assert_array_equal(zero, np.where(a >= 0, down, up))
    exact = torch.from_numpy(a).to(dtype).double().numpy() == a
    np.testing.assert_array_equal(down == up, exact)


@EXAMPLES
@given(bits=arrays(np.uint16, 32))
def test_convert_from_half(bits):
    half = bits.view(np.float16)
    brain = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    texts = [
        ("cvt.f32.f16 $, %a", np.float32),
        ("cvt.f32.bf16 $, %a", np.float32),
        ("cvt.rzi.s32.f16 $, %a", np.int32),
        ("cvt.f64.f16 $, %a", np.float64),
    ]
    single, from_bf16, integer, double = evaluate(texts, a=bits)
    np.testing.assert_array_equal(single, half.astype(np.float32))
    np.testing.assert_array_equal(from_bf16, brain.float().numpy())
    np.testing.assert_array_equal(double, half.astype(np.float64))
    finite = np.isfinite(half)
    np.testing.assert_array_equal(integer[finite], np.trunc(half[finite].astype(np.float64)).astype(np.int32))


def test_double_rounding_is_avoided():
    """Values whose rounding through fp32 differs from the direct one."""
    values = np.array([1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-8 + 2.0**-30] * 16)
    f16, bf16 = evaluate([("cvt.rn.f16.f64 $, %a", np.float16), ("cvt.rn.bf16.f64 $, %a", np.uint16)], a=values)
    assert f16[0] == np.float16(1 + 2.0**-10)
    assert bf16[1] == 0x3F81
