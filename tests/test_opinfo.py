"""torch's own samples and error inputs of layer_norm, rms_norm and cross_entropy, and a table of bad inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, OPS, exception_of

import fused_norm
import fused_norm.functional as FF

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
from torch.testing._internal.common_methods_invocations import op_db

#: Ours, by the name of torch's function that it must be.
FUNCTIONS = {
    "layer_norm": FF.layer_norm,
    "rms_norm": FF.rms_norm,
    "cross_entropy": partial(FF.ticks_cross_entropy, ticks_weight=0.0),
}
operations = pytest.mark.parametrize("op", FUNCTIONS)

OP_INFOS = {
    info.name.removeprefix("nn.functional."): info
    for info in op_db
    if info.name in {f"nn.functional.{o}" for o in FUNCTIONS}
}

# How far two right answers may lie apart, beside what torch's own lies from the fp64 truth: its dx of a row of one
# element, which is exactly 0, comes out as 1e-4.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}


def test_all_operations_have_samples() -> None:
    assert sorted(OP_INFOS) == sorted(FUNCTIONS)


def _tensors(sample) -> list[torch.Tensor]:
    return [t for t in (sample.input, *sample.args, *sample.kwargs.values()) if isinstance(t, torch.Tensor)]


def _double(value):
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().double().requires_grad_(value.requires_grad) if floating else value


def _output_and_gradients(function: Callable, sample, upstream_seed: int, dtype: torch.dtype):
    y = function(sample.input, *sample.args, **sample.kwargs)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(upstream_seed), dtype=torch.float64).to(
        dtype
    )
    wanted = [t for t in _tensors(sample) if t.requires_grad]
    return y, torch.autograd.grad(y, wanted, upstream.to(y.device, y.dtype), allow_unused=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@operations
def test_samples(op: str, dtype: torch.dtype, place) -> None:
    info = OP_INFOS[op]
    samples = list(info.sample_inputs(place.device, dtype, requires_grad=True))
    samples += list(info.reference_inputs(place.device, dtype, requires_grad=True))
    assert len(samples) >= 6
    for i, sample in enumerate(samples):
        theirs, their_grads = _output_and_gradients(getattr(F, op), sample, i, dtype)
        ours, our_grads = _output_and_gradients(FUNCTIONS[op], sample, i, dtype)
        truth, true_grads = _output_and_gradients(getattr(F, op), sample.transform(_double), i, dtype)
        for a, b, t in zip((ours, *our_grads), (theirs, *their_grads), (truth, *true_grads), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan())
                allowed = TOLERANCE[dtype] * (1 + t.abs()) + (b.double() - t).abs()
                assert ((a.double() - b.double()).abs() <= allowed)[~b.isnan()].all(), f"sample {i}: {a} instead of {b}"


@operations
def test_derivatives_of_samples(op: str, place) -> None:
    """Finite differences, first and second order, reverse and forward mode and mixed, each batched too."""
    samples = list(OP_INFOS[op].sample_inputs(place.device, torch.float64, requires_grad=True))
    assert len(samples) >= 6
    for sample in samples:
        leaves = _tensors(sample)

        def function(*tensors: torch.Tensor, sample=sample) -> torch.Tensor:
            given = iter(tensors)

            def put(value):
                return next(given) if isinstance(value, torch.Tensor) else value

            return FUNCTIONS[op](
                put(sample.input), *map(put, sample.args), **{k: put(v) for k, v in sample.kwargs.items()}
            )

        batched = {"check_batched_grad": True}
        torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_forward_grad=True, **batched)
        torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, **batched)


@operations
def test_error_inputs(op: str, place) -> None:
    info = OP_INFOS[op]
    if info.error_inputs_func is None:
        pytest.skip(f"torch has no error inputs for {op}")
    errors = list(info.error_inputs(place.device))
    assert errors
    for error in errors:
        sample = error.sample_input
        with pytest.raises(error.error_type) as caught:
            FUNCTIONS[op](sample.input, *sample.args, **sample.kwargs)
        assert type(caught.value) is error.error_type


# ------------------------------------------------------------------------------------------------------- bad inputs


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape).to(dtype)


def _ones(*shape: int, **kwargs) -> torch.Tensor:
    return torch.ones(shape, **kwargs)


@dataclass(frozen=True)
class Bad:
    """One call that some function refuses. ``says``: patterns the message must have, so that it names both values.

    Whether a function refuses it, and with which class, is asked of torch.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    says: tuple[str, ...] = ()
    ops: tuple[str, ...] = OPS


BAD = (
    Bad("normalized_shape=()", (_x(3, 4), ()), says=("normalized_shape",)),
    Bad("normalized_shape=() of 0-d", (_x(), ()), says=("normalized_shape",)),
    Bad("0-d input", (_x(), (7,)), says=(r"\b7\b|\b1\b",)),
    Bad("wrong last dimension", (_x(3, 4), (5,)), says=(r"\b5\b", r"\b3, 4\b")),
    Bad("wrong trailing dimensions", (_x(2, 3, 4), (2, 4)), says=(r"\b2, 4\b", r"\b2, 3, 4\b")),
    Bad("leading dimension only", (_x(3, 4), (3,)), says=(r"\b3\b", r"\b3, 4\b")),
    Bad("broadcastable is not enough", (_x(3, 4), (1,)), says=(r"\b1\b", r"\b3, 4\b")),
    Bad(
        "normalized_shape longer than the input", (_x(3, 4), (2, 3, 4)), says=(r"\b2, 3, 4\b|\b3\b", r"\b3, 4\b|\b2\b")
    ),
    Bad("negative size", (_x(3, 4), (-1,)), says=(r"-1", r"\b3, 4\b")),
    Bad("wrong size of no columns", (_x(3, 0), (4,)), says=(r"\b4\b", r"\b3, 0\b")),
    Bad("wrong shape of no rows", (_x(0, 4), (5,)), says=(r"\b5\b", r"\b0, 4\b")),
    Bad("weight too short", (_x(3, 4), (4,), _ones(3)), says=("weight", r"\b3\b", r"\b4\b")),
    Bad("weight too long", (_x(3, 4), (4,), _ones(9)), says=("weight", r"\b9\b", r"\b4\b")),
    Bad("weight of as many elements", (_x(3, 2, 2), (2, 2), _ones(4)), says=("weight", r"\b4\b", r"\b2, 2\b")),
    Bad("weight with a dimension more", (_x(3, 4), (4,), _ones(1, 4)), says=("weight", r"\b1, 4\b")),
    Bad("0-d weight", (_x(3, 1), (1,), _ones()), says=("weight",)),
    Bad("bias too short", (_x(3, 4), (4,), _ones(4), _ones(3)), says=("bias", r"\b3\b", r"\b4\b"), ops=("layer_norm",)),
    Bad(
        "bias alone too long", (_x(3, 4), (4,), None, _ones(9)), says=("bias", r"\b9\b", r"\b4\b"), ops=("layer_norm",)
    ),
    Bad("int64 input", (_x(3, 4, dtype=torch.int64), (4,)), says=("int64|Long",)),
    Bad("uint8 input", (_x(3, 4, dtype=torch.uint8), (4,)), says=("uint8|Byte",)),
    Bad("bool input", (_x(3, 4, dtype=torch.bool), (4,)), says=("(?i)bool",)),
    Bad("complex64 input", (_x(3, 4, dtype=torch.complex64), (4,)), says=("complex64|ComplexFloat",)),
    Bad("complex128 input", (_x(3, 4, dtype=torch.complex128), (4,)), says=("complex128|ComplexDouble",)),
    Bad("float8 input", (_x(3, 4).to(torch.float8_e4m3fn), (4,)), says=("(?i)float8_e4m3fn",)),
    Bad("float8 e5m2 input", (_x(3, 4).to(torch.float8_e5m2), (4,)), says=("(?i)float8_e5m2",)),
    Bad("normalized_shape an int", (_x(3, 4), 4), says=("normalized_shape", "int")),
    Bad("normalized_shape a float", (_x(3, 4), 4.0), says=("normalized_shape", "float")),
    Bad("normalized_shape None", (_x(3, 4), None), says=("normalized_shape", "None")),
    Bad("normalized_shape a str", (_x(3, 4), "4"), says=("normalized_shape", "str")),
    Bad("normalized_shape a tensor", (_x(3, 4), torch.tensor([4])), says=("normalized_shape", "Tensor")),
    Bad("normalized_shape of floats", (_x(3, 4), [4.0]), says=("normalized_shape", "float")),
    Bad("normalized_shape of bools", (_x(3, 1), (True,)), says=("normalized_shape", "bool")),
    Bad("eps=None", (_x(3, 4), (4,)), {"eps": None}, says=("eps", "None")),
    Bad("eps a str", (_x(3, 4), (4,)), {"eps": "1e-5"}, says=("eps", "str")),
    Bad("weight a list", (_x(3, 4), (4,), [1.0] * 4), says=("weight", "list")),
    Bad("bias a list", (_x(3, 4), (4,), None, [1.0] * 4), says=("bias", "list"), ops=("layer_norm",)),
    Bad("input a list", ([1.0, 2.0], (2,)), says=("input", "list")),
    Bad("input None", (None, (2,)), says=("input", "None")),
    Bad("input a numpy array", (np.ones((3, 4)), (4,)), says=("input", "ndarray")),
    Bad("weight on another device", (_x(3, 4), (4,), _ones(4, device="meta")), says=("meta", "cpu")),
    Bad(
        "bias on another device",
        (_x(3, 4), (4,), None, _ones(4, device="meta")),
        says=("meta", "cpu"),
        ops=("layer_norm",),
    ),
    Bad("input on another device", (_x(3, 4).to("meta"), (4,), _ones(4)), says=("meta", "cpu")),
    Bad(
        "fp64 weight, fp32 input",
        (_x(3, 4), (4,), _ones(4, dtype=torch.float64)),
        says=("float64|Double", "float32|Float"),
    ),
    Bad("fp32 weight, fp64 input", (_x(3, 4, dtype=torch.float64), (4,), _ones(4)), says=("float64", "float32")),
    Bad("bf16 weight, fp32 input", (_x(3, 4), (4,), _ones(4, dtype=torch.bfloat16)), says=("bfloat16", "float32")),
    Bad(
        "bf16 weight, fp16 input",
        (_x(3, 4, dtype=torch.float16), (4,), _ones(4, dtype=torch.bfloat16)),
        says=("bfloat16", "float16"),
    ),
    Bad(
        "fp64 weight, bf16 input",
        (_x(3, 4, dtype=torch.bfloat16), (4,), _ones(4, dtype=torch.float64)),
        says=("float64", "bfloat16"),
    ),
    Bad("int weight", (_x(3, 4), (4,), _ones(4, dtype=torch.int64)), says=("int64", "float32")),
    Bad(
        "fp64 bias, fp32 input",
        (_x(3, 4), (4,), _ones(4), _ones(4, dtype=torch.float64)),
        says=("float64",),
        ops=("layer_norm",),
    ),
    Bad(
        "fp32 weight, bf16 bias",
        (_x(3, 4, dtype=torch.bfloat16), (4,), _ones(4), _ones(4, dtype=torch.bfloat16)),
        says=("bfloat16", "float32"),
        ops=("layer_norm",),
    ),
    Bad(
        "bf16 weight, fp32 bias",
        (_x(3, 4, dtype=torch.bfloat16), (4,), _ones(4, dtype=torch.bfloat16), _ones(4)),
        says=("bfloat16", "float32"),
        ops=("layer_norm",),
    ),
    Bad("sparse input", (_x(3, 4).to_sparse(), (4,))),
    Bad("sparse weight", (_x(3, 4), (4,), _ones(4).to_sparse())),
    Bad("no arguments", ()),
    Bad("no normalized_shape", (_x(3, 4),)),
    Bad("an unknown option", (_x(3, 4), (4,)), {"epsilon": 1e-5}, says=("epsilon",)),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bad", BAD, ids=lambda b: b.name)
@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_bad_input(op: str, bad: Bad, backend: str, reference_calls) -> None:
    """The class is torch's for the same function; where torch accepts, as rms_norm does more, so is the result."""
    if op not in bad.ops:
        pytest.skip(f"{op} has no such argument")
    theirs = exception_of(getattr(F, op), *bad.args, **bad.kwargs)
    with fused_norm.use_backend(backend):
        if theirs is None:
            result = getattr(FF, op)(*bad.args, **bad.kwargs)
            expected = getattr(F, op)(*bad.args, **bad.kwargs)
            assert result.dtype == expected.dtype
            torch.testing.assert_close(result, expected)
            return
        with pytest.raises(type(theirs)) as caught:
            getattr(FF, op)(*bad.args, **bad.kwargs)
    assert type(caught.value) is type(theirs)
    for pattern in bad.says:
        assert re.search(pattern, str(caught.value)), f"{pattern!r} is not in {caught.value}"
    assert not reference_calls.forward, "a kernel saw the bad input"


def test_the_table_is_bad() -> None:
    """torch refuses every row of the table for at least one of the two functions."""
    for bad in BAD:
        refusals = [exception_of(getattr(F, op), *bad.args, **bad.kwargs) for op in bad.ops]
        assert any(refusals), bad.name


#: Unusual arguments that torch accepts.
GOOD = {
    "list": [4],
    "torch.Size": torch.Size([4]),
    "numpy int": (np.int64(4),),
    "0-d tensor element": (torch.tensor(4),),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", GOOD.values(), ids=GOOD)
def test_spellings_of_normalized_shape(op: str, shape, place) -> None:
    x = torch.randn(3, 4, device=place.device)
    torch.testing.assert_close(getattr(FF, op)(x, shape), getattr(F, op)(x, shape))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("eps", [1, True, 0.5, np.float32(0.25), float("inf"), -0.1, 0, 1e-30])
def test_spellings_of_eps(op: str, eps, place) -> None:
    x = torch.randn(3, 8, device=place.device)
    torch.testing.assert_close(getattr(FF, op)(x, (8,), eps=eps), getattr(F, op)(x, (8,), eps=eps), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_default_eps_of_rms_norm(dtype: torch.dtype, place) -> None:
    """None means the epsilon of the dtype that is computed in: fp64's for fp64, fp32's for the others."""
    x = (torch.randn(3, 8) * 1e-4).to(place.device, dtype)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    expected = (x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()).to(dtype)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0.0}
    torch.testing.assert_close(FF.rms_norm(x, (8,)), expected, **tolerance)
    torch.testing.assert_close(FF.rms_norm(x, (8,), eps=None), expected, **tolerance)
    torch.testing.assert_close(F.rms_norm(x, (8,)), expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_rms_norm_of_complex_input(dtype: torch.dtype, place) -> None:
    x, w, dy = (torch.randn(*s, dtype=dtype, device=place.device) for s in ((3, 4), (4,), (3, 4)))
    results = []
    for namespace in (FF, F):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        y = namespace.rms_norm(leaves[0], (4,), leaves[1])
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
