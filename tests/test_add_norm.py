"""add_layer_norm and add_rms_norm: dropout, residual connection and norm as one, and what torch does with the parts."""

from __future__ import annotations

import copy
import itertools
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LOW_PRECISION, assert_same_bits, exception_of, leaf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_norm
import fused_norm.functional as FF
from fused_norm import reference
from fused_norm.testing import relative_error

OPS = ("add_layer_norm", "add_rms_norm")
both_ops = pytest.mark.parametrize("op", OPS)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def _call(op: str, x: Tensor, r: Tensor, params: list[Tensor], **options) -> tuple[Tensor, Tensor]:
    shape = params[0].shape if params else x.shape[-1:]
    return getattr(FF, op)(x, r, shape, *params, eps=1e-5, **options)


def _parts(op: str, x: Tensor, r: Tensor, params: list[Tensor], mask: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """The same by torch's operations, one by one."""
    summed = (x if isinstance(mask, float) else x * mask) + r
    shape = params[0].shape if params else x.shape[-1:]
    norm = F.layer_norm if op == "add_layer_norm" else F.rms_norm
    return norm(summed, shape, *params, eps=1e-5), summed


def _inputs(op: str, rows: int, n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, r = (torch.randn(rows, n).to(device, dtype) for _ in range(2))
    params = [(torch.randn(n) * 0.3 + 1).to(device, dtype), (torch.randn(n) * 0.3).to(device, dtype)]
    return x, r, params if op == "add_layer_norm" else params[:1]


def _has_our_mask(place) -> bool:
    return place.backend != "torch"


# -------------------------------------------------------------------------------------------------- without dropout


@both_ops
@all_dtypes
@pytest.mark.parametrize("rows, n", [(1, 1), (5, 63), (17, 768), (3, 4097)])
def test_outputs_are_those_of_the_parts(op: str, rows: int, n: int, dtype: torch.dtype, place) -> None:
    """The sum is torch's to the bit, and the norm our norm's of it."""
    x, r, params = _inputs(op, rows, n, dtype, place.device)
    y, summed = _call(op, x, r, params)
    assert_same_bits(summed, x + r)
    norm = FF.layer_norm if op == "add_layer_norm" else FF.rms_norm
    assert_same_bits(y, norm(summed, (n,), *params, eps=1e-5))
    assert y.is_contiguous() and summed.is_contiguous()
    assert y.data_ptr() != summed.data_ptr()


@both_ops
@all_dtypes
@pytest.mark.parametrize("used", ["both", "output", "summed"])
@pytest.mark.parametrize("rows, n", [(5, 63), (40, 768)])
def test_gradients(op: str, rows: int, n: int, used: str, dtype: torch.dtype, place) -> None:
    """Of every input, whichever outputs are used, against fp64; torch's own separate operations set the scale."""
    x, r, params = _inputs(op, rows, n, dtype, place.device)
    upstream = [torch.randn(rows, n).to(place.device, dtype) for _ in range(2)]

    def gradients(function, dtype=dtype):
        leaves = [leaf(t.to(dtype)) for t in (x, r, *params)]
        outputs = function(op, leaves[0], leaves[1], leaves[2:])
        chosen = {"both": (0, 1), "output": (0,), "summed": (1,)}[used]
        given = [upstream[i].to(dtype) for i in chosen]
        return torch.autograd.grad([outputs[i] for i in chosen], leaves, given, allow_unused=True)

    truth = []
    summed = (x + r).double()  # rounded as the norm's input is
    exact = [leaf(t.double()) for t in (summed, *params)]
    y, _ = _parts(op, exact[0], torch.zeros_like(summed), exact[1:])
    total = (y * upstream[0].double()).sum() * (used != "summed")
    d, *dparams = torch.autograd.grad(total, exact)
    d = d + upstream[1].double() * (used != "output")
    truth = [d, d, *dparams]
    for i, (ours, theirs, exact_one) in enumerate(zip(gradients(_call), gradients(_parts), truth, strict=True)):
        assert (ours is None) == (theirs is None), i
        if ours is None:
            continue
        assert ours.dtype == dtype and ours.shape == theirs.shape
        factor = 1.05 if dtype in LOW_PRECISION else 1.5
        rounding = 0.4 * torch.finfo(dtype).eps / 2
        floor = (3 if i > 1 else 1.05) if dtype in LOW_PRECISION else 8
        rounded = relative_error(exact_one.to(dtype), exact_one)
        if i > 1 and place.backend == "torch":
            floor = 200  # torch sums bf16 dw in bf16 on a CPU
        assert relative_error(ours, exact_one) <= max(
            factor * relative_error(theirs, exact_one), floor * max(rounding, rounded)
        ), i


@both_ops
def test_every_subset_of_inputs_that_require_grad(op: str, place) -> None:
    x, r, params = _inputs(op, 6, 33, torch.float64, place.device)
    tensors = [x, r, *params]
    dy, ds = torch.randn_like(x), torch.randn_like(x)
    for p in (0.0, 0.5) if _has_our_mask(place) else (0.0,):
        for subset in itertools.product([False, True], repeat=len(tensors)):
            if not any(subset):
                continue
            results = []
            for function in ("ours", "parts"):
                torch.manual_seed(3)
                leaves = [t.detach().requires_grad_(needed) for t, needed in zip(tensors, subset, strict=True)]
                mask = reference.dropout_mask(torch.randint(2**62, (), device=place.device), x, p) if p else 1.0
                torch.manual_seed(3)
                if function == "ours":
                    outputs = _call(op, leaves[0], leaves[1], leaves[2:], dropout_p=p)
                else:
                    outputs = _parts(op, leaves[0], leaves[1], leaves[2:], mask)
                wanted = [t for t in leaves if t.requires_grad]
                pairs = [(o, d) for o, d in zip(outputs, (dy, ds), strict=True) if o.requires_grad]
                outputs, upstream = ([pair[i] for pair in pairs] for i in (0, 1))
                results.append(torch.autograd.grad(outputs, wanted, upstream, allow_unused=True))
            for a, e in zip(*results, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@both_ops
def test_layouts(op: str, place) -> None:
    base = torch.randn(6, 8, 24, dtype=torch.float64, device=place.device)
    layouts = {
        "contiguous": base,
        "transposed": base.transpose(0, 1).contiguous().transpose(0, 1),
        "last dimension apart": base.mT.contiguous().mT,
        "rows apart": F.pad(base, (0, 5))[..., :24],
        "expanded": base[:1].expand(6, 8, 24),
    }
    _, _, params = _inputs(op, 1, 24, torch.float64, place.device)
    for (_, x), (_, r) in itertools.product(layouts.items(), repeat=2):
        leaves = [leaf(t) for t in params]
        inputs = [x.detach().requires_grad_(), r.detach().requires_grad_()]
        outputs = _call(op, *inputs, leaves)
        expected = _parts(op, *inputs, leaves)
        upstream = [base[:, :1].expand_as(base), base.transpose(0, 1).contiguous().transpose(0, 1)]
        for a, e in zip(outputs, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
        wanted = [*inputs, *leaves]
        for a, e in zip(
            torch.autograd.grad(outputs, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
        ):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@both_ops
def test_one_tensor_as_both_inputs(op: str, place) -> None:
    x, _, params = _inputs(op, 4, 16, torch.float64, place.device)
    results = []
    for function in (_call, _parts):
        a = leaf(x)
        outputs = function(op, a, a, params)
        results.append(torch.autograd.grad(outputs, a, [x.sin(), x.cos()])[0])
    torch.testing.assert_close(*results)


@both_ops
def test_leaves_whose_gradients_are_one_tensor_accumulate_apart(op: str, place) -> None:
    """Without dropout both inputs have the same gradient: writing to one's must not write to the other's."""
    x, r, params = _inputs(op, 4, 16, torch.float32, place.device)
    x, r = leaf(x), leaf(r)
    y, _ = _call(op, x, r, params)
    y.sin().sum().backward()
    before = r.grad.clone()
    x.grad.zero_()
    assert_same_bits(r.grad, before)
    y, _ = _call(op, x, r, params)
    y.sin().sum().backward()
    torch.testing.assert_close(r.grad, 2 * before)


@both_ops
@pytest.mark.parametrize("low", LOW_PRECISION, ids=str)
def test_dtypes_are_promoted_as_by_plus(op: str, low: torch.dtype, place) -> None:
    x, r, params = _inputs(op, 5, 48, torch.float32, place.device)
    for a, b in ((x.to(low), r), (x, r.to(low)), (x.double(), r), (x.bfloat16(), r.half())):
        wide = torch.promote_types(a.dtype, b.dtype)
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        leaves = [leaf(p.to(wide)) for p in params]
        y, summed = _call(op, a, b, leaves)
        assert_same_bits(summed.detach(), (a + b).detach())
        assert y.dtype == wide
        da, db, *_ = torch.autograd.grad(
            (y * torch.linspace(-1, 1, 48, device=place.device)).sum() + summed.sin().sum(), (a, b, *leaves)
        )
        assert (da.dtype, db.dtype) == (a.dtype, b.dtype)
        torch.testing.assert_close(da.double(), db.double(), rtol=2e-2, atol=2e-2)


@both_ops
def test_fp32_parameters_beside_low_precision(op: str, place) -> None:
    x, r, params = _inputs(op, 5, 48, torch.float32, place.device)
    for dtype in LOW_PRECISION:
        leaves = [leaf(p) for p in params]
        y, summed = _call(op, x.to(dtype), r.to(dtype), leaves)
        assert y.dtype == summed.dtype == dtype
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sin().sum(), leaves))


# ---------------------------------------------------------------------------------------------------------- dropout


def _mask(op: str, place, shape, p: float, dtype=torch.float32) -> Tensor:
    ones = torch.ones(shape, dtype=dtype, device=place.device)
    return _call(op, ones, torch.zeros_like(ones), [], dropout_p=p)[1]


@both_ops
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate(op: str, p: float, place) -> None:
    """Four standard deviations about 1 - p over a million elements, and so in every column; the scale is 1/(1 - p)."""
    mask = _mask(op, place, (1000, 1001), p)
    kept = mask != 0
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)))
    count, deviation = kept.numel(), (p * (1 - p)) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 4 * deviation / count**0.5
    per_column = kept.double().mean(0) - (1 - p)
    assert per_column.abs().max() < 5.5 * deviation / 1000**0.5


@both_ops
def test_elements_are_independent(op: str, place) -> None:
    """No correlation along rows or columns, within a Philox block of four words or beyond, nor between two calls."""
    first, second = (_mask(op, place, (512, 1024), 0.5).double() - 1 for _ in range(2))
    flat = first.flatten()
    limit = 5 / flat.numel() ** 0.5
    for lag in (1, 2, 3, 4, 5, 1024, 4096):
        assert abs((flat[:-lag] * flat[lag:]).mean().item()) < limit, lag
    assert abs((first * second).mean().item()) < limit


@both_ops
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 33), (2, 3, 64), (4, 1000), (5, 1001)], ids=str)
def test_the_mask_is_the_contracts(op: str, shape, place) -> None:
    """A function of the seed and the element's place, the same on every backend, in every dtype and layout."""
    if not _has_our_mask(place):
        pytest.skip("torch's own dropout")
    torch.manual_seed(11)
    seed = torch.randint(2**62, (), device=place.device)
    for dtype in DTYPES:
        torch.manual_seed(11)
        mask = _mask(op, place, shape, 0.3, dtype)
        expected = reference.dropout_mask(seed, mask, 0.3).to(dtype)
        assert_same_bits(mask, expected)
    torch.manual_seed(11)
    ones = torch.ones(*shape[:-1], 2 * shape[-1], device=place.device)[..., : shape[-1]]
    strided = _call(op, ones, torch.zeros_like(ones), [], dropout_p=0.3)[1]
    assert_same_bits(strided, reference.dropout_mask(seed, strided, 0.3))


@both_ops
@all_dtypes
def test_backward_has_forwards_mask(op: str, dtype: torch.dtype, place) -> None:
    x, r, params = _inputs(op, 20, 63, dtype, place.device)
    x, r = leaf(x.sign() + x), leaf(r)  # far enough from 0 to tell what was dropped
    y, summed = _call(op, x, r, params, dropout_p=0.4)
    dx, dr = torch.autograd.grad((y, summed), (x, r), (torch.randn_like(y), torch.randn_like(y)))
    mask = (summed.detach().double() - r.detach().double()) / x.detach().double()
    dropped = mask.abs() < 0.2
    assert 0.2 < dropped.double().mean() < 0.6
    assert (dx[dropped] == 0).all() and (dr[dropped] != 0).any()
    kept = ~dropped
    torch.testing.assert_close(dx[kept].double(), dr[kept].double() / 0.6, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@both_ops
def test_the_generator_is_respected(op: str, place) -> None:
    x, r, params = _inputs(op, 8, 40, torch.float32, place.device)

    def run():
        return _call(op, x, r, params, dropout_p=0.5)[1]

    torch.manual_seed(5)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert_same_bits(run(), first)
    state = torch.get_rng_state() if place.device == "cpu" else torch.cuda.get_rng_state()
    third = run()
    (torch.set_rng_state if place.device == "cpu" else torch.cuda.set_rng_state)(state)
    assert_same_bits(run(), third)
    before = torch.get_rng_state()
    _call(op, x, r, params, dropout_p=0.5, training=False)
    _call(op, x, r, params, dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn where nothing is dropped
    assert_same_bits(_call(op, x, r, params, dropout_p=0.5, training=False)[1], x + r)


@both_ops
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_again(op: str, use_reentrant: bool, place) -> None:
    x, r, params = _inputs(op, 8, 40, torch.float64, place.device)
    results = []
    for how in ("plain", "checkpoint"):
        torch.manual_seed(5)
        leaves = [leaf(t) for t in (x, r, *params)]

        def block(x, r, *params):
            y, summed = _call(op, x.sin(), r, list(params), dropout_p=0.3)
            return y * 2 + summed.cos()

        if how == "plain":
            out = block(*leaves)
        else:
            with fused_norm.use_backend(place.backend):
                out = checkpoint(block, *leaves, use_reentrant=use_reentrant)
        results.append(torch.autograd.grad(out.sum(), leaves) if not use_reentrant else _backward(out, leaves))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def _backward(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    out.sum().backward()  # reentrant checkpointing knows no autograd.grad
    return [t.grad for t in leaves]


@both_ops
def test_what_is_saved(op: str, place) -> None:
    """The sum, statistics, weight and seed: neither a mask nor the inputs."""
    if not _has_our_mask(place):
        pytest.skip("torch's own dropout")
    x, r, params = _inputs(op, 64, 512, torch.float32, place.device)
    saved = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    x = leaf(x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _, summed = _call(op, x, r, params, dropout_p=0.3)
    sizes = sorted(t.numel() for t in saved)
    assert sizes[-1] == summed.numel() and sum(sizes[:-1]) <= 2 * 64 + 512 + 1


@both_ops
@pytest.mark.parametrize("wrong", [None, 1.0, "x"])
def test_what_is_no_tensor(op: str, wrong: object) -> None:
    """As torch's own: a TypeError with the argument and its type."""
    x = torch.randn(2, 4)
    call = getattr(FF, op)
    for args, name in (((wrong, x), "input"), ((x, wrong), "residual")):
        with pytest.raises(TypeError, match=f"{call.__name__}.*'{name}' must be Tensor, not {type(wrong).__name__}"):
            call(*args, (4,))


@both_ops
def test_probabilities_at_the_ends(op: str, place) -> None:
    x, r, params = _inputs(op, 6, 32, torch.float64, place.device)
    leaves = [leaf(x), leaf(r)]
    y, summed = _call(op, *leaves, params, dropout_p=1.0)
    assert_same_bits(summed.detach(), r)
    dx, dr = torch.autograd.grad(y.sin().sum(), leaves)
    assert (dx == 0).all() and (dr != 0).any()
    for p, rate in ((1e-12, 1.0), (1 - 1e-12, 0.0)):
        mask = _mask(op, place, (100, 100), p, torch.float64)
        assert ((mask != 0).double().mean() - rate).abs() < 1e-3
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=re.escape(str(p))):
            _call(op, x, r, params, dropout_p=p)
        with pytest.raises(ValueError, match=re.escape(str(p))):
            _call(op, x, r, params, dropout_p=p, training=False)


@both_ops
def test_a_dropped_nan_is_nan(op: str, place) -> None:
    """As torch's dropout, which multiplies; other rows do not notice."""
    x, r, params = _inputs(op, 6, 32, torch.float32, place.device)
    torch.manual_seed(1)
    y, _ = _call(op, x, r, params, dropout_p=0.5)
    x = x.clone()
    x[2, 5] = float("nan")
    torch.manual_seed(1)
    z, summed = _call(op, x, r, params, dropout_p=0.5)
    assert summed[2, 5].isnan() and summed.isnan().sum() == 1
    others = [0, 1, 3, 4, 5]
    assert_same_bits(z[others], y[others])


# ------------------------------------------------------------------------------------------------------- torch.func


@both_ops
def test_vmaps_randomness_is_honoured(op: str, place) -> None:
    if not _has_our_mask(place):
        pytest.skip("torch's own dropout")
    ones = torch.ones(5, 4, 32, device=place.device)

    def masks(x):
        return _call(op, x, torch.zeros_like(x), [], dropout_p=0.5)[1]

    with pytest.raises(RuntimeError, match="random"):
        torch.func.vmap(masks)(ones)
    same = torch.func.vmap(masks, randomness="same")(ones)
    assert all(torch.equal(same[0], m) for m in same)
    different = torch.func.vmap(masks, randomness="different")(ones)
    assert not any(torch.equal(different[0], m) for m in different[1:])
    assert set(different.unique().tolist()) == {0.0, 2.0}


@both_ops
def test_torch_func(op: str, place) -> None:
    """grad, per-sample gradients, forward mode and Hessian-vector products, with a mask."""
    if not _has_our_mask(place):
        pytest.skip("torch's own dropout")
    x, r, params = _inputs(op, 3, 10, torch.float64, place.device)
    torch.manual_seed(2)
    mask = reference.dropout_mask(torch.randint(2**62, (), device=place.device), x, 0.5)

    def loss(function, x, r, *params):
        torch.manual_seed(2)
        y, s = function(op, x, r, list(params))
        return (y.sin() * torch.linspace(-1, 2, 10, device=place.device)).sum() + (s**3).sum()

    ours = lambda *args: loss(lambda op, x, r, ps: _call(op, x, r, ps, dropout_p=0.5), *args)  # noqa: E731
    parts = lambda *args: loss(lambda op, x, r, ps: _parts(op, x, r, ps, mask), *args)  # noqa: E731
    inputs = (x, r, *params)
    everything = tuple(range(len(inputs)))
    tangents = tuple(torch.randn_like(t) for t in inputs)
    for transform in (
        lambda f: torch.func.grad(f, everything)(*inputs),
        lambda f: torch.func.jvp(f, inputs, tangents),
        lambda f: torch.func.jvp(torch.func.grad(f, (0, 1, 2)), inputs, tangents)[1],
        lambda f: torch.func.jacrev(torch.func.grad(f), 0)(*inputs),
    ):
        a, e = transform(ours), transform(parts)
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-8)


@both_ops
def test_forward_mode_with_dual_numbers(op: str, place) -> None:
    x, r, params = _inputs(op, 3, 10, torch.float64, place.device)
    tangents = [torch.randn_like(t) for t in (x, r, *params)]
    results = []
    for function in (_call, _parts):
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(t, d) for t, d in zip((x, r, *params), tangents, strict=True)]
            outputs = function(op, *duals[:2], duals[2:])
            results += [torch.autograd.forward_ad.unpack_dual(o).tangent for o in outputs]
    torch.testing.assert_close(results[:2], results[2:], rtol=1e-9, atol=1e-9)


@both_ops
def test_second_derivatives_through_a_graph(op: str, place) -> None:
    """A gradient penalty, with the mask of forward in both."""
    if not _has_our_mask(place):
        pytest.skip("torch's own dropout")
    x, r, params = _inputs(op, 4, 12, torch.float64, place.device)
    results = []
    for ours in (True, False):
        torch.manual_seed(2)
        mask = reference.dropout_mask(torch.randint(2**62, (), device=place.device), x, 0.5)
        torch.manual_seed(2)
        leaves = [leaf(t) for t in (x, r, *params)]
        y, s = _call(op, *leaves[:2], leaves[2:], dropout_p=0.5) if ours else _parts(op, *leaves[:2], leaves[2:], mask)
        gradients = torch.autograd.grad(y.sin().sum() + (s**3).sum(), leaves, create_graph=True)
        penalty = sum((g * g.detach().cos()).sum() for g in gradients)
        results.append(torch.autograd.grad(penalty, leaves))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-8)


# ------------------------------------------------------------------------------------------ compile, export, and others


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@both_ops
def test_compile(op: str, place, fresh_dynamo) -> None:
    """No graph break, eager's bits without dropout, and with it backward's mask is forward's."""
    if not _has_our_mask(place):
        pytest.skip("Inductor decomposes torch's own")

    def function(x, r, *params, p=0.0):
        return _call(op, x.sin(), r, list(params), dropout_p=p)

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for rows in (5, 9):
        x, r, params = _inputs(op, rows, 48, torch.float32, place.device)
        upstream = [torch.randn_like(x) for _ in range(2)]
        results = []
        for f in (compiled, function):
            leaves = [leaf(t) for t in (x, r, *params)]
            outputs = f(*leaves)
            results.append([*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, upstream)])
        sines = torch.allclose(results[0][1], results[1][1], atol=1e-6)  # Inductor's own sine may round otherwise
        assert sines
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
        leaves = [leaf(t) for t in (x, r, *params)]
        _, summed = compiled(*leaves, p=0.4)
        dropped = (summed - r).detach() == 0
        assert 0.2 < dropped.double().mean() < 0.6
        (dx,) = torch.autograd.grad(summed, leaves[0], torch.ones_like(summed))
        assert ((dx == 0) == dropped).all()
        torch.manual_seed(4)
        first = compiled(*leaves, p=0.4)[1]
        torch.manual_seed(4)
        assert_same_bits(compiled(*leaves, p=0.4)[1].detach(), first.detach())


@both_ops
def test_compiled_graphs_hold_the_kernels(op: str, place, fresh_dynamo) -> None:
    if place.backend not in ("native", "triton"):
        pytest.skip("no kernels of its own")
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    found = []

    def compiler(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph)

    x, r, params = _inputs(op, 5, 48, torch.float32, place.device)
    function = torch.compile(_call, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    y, summed = function(op, leaf(x), leaf(r), params, dropout_p=0.3)
    (y.sin().sum() + summed.sin().sum()).backward()
    prefix = {"native": "fused_norm.", "triton": "fused_norm.triton_"}[place.backend]
    prefix += "norm_" if place.composes else "add_norm_"
    kernels = [name for name in found if name.startswith("fused_norm.")]
    assert kernels == [f"{prefix}forward.default", f"{prefix}backward.default"]


@both_ops
def test_torch_func_inside_compiled_code(op: str, place, fresh_dynamo) -> None:
    x, r, params = _inputs(op, 3, 12, torch.float64, place.device)

    def gradient(x, r, *params):
        return torch.func.grad(lambda x: _call(op, x, r, list(params))[0].sin().sum())(x)

    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, r, *params), gradient(x, r, *params))
    assert (gradient(x, r, *params) != 0).any()


@both_ops
def test_export(op: str, place) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            cls = fused_norm.AddLayerNorm if op == "add_layer_norm" else fused_norm.AddRMSNorm
            self.norm = cls(16, p=0.1)

        def forward(self, x, r):
            return self.norm(x, r)

    block = Block().to(place.device).eval()
    x, r, _ = _inputs(op, 4, 16, torch.float32, place.device)
    program = torch.export.export(block, (x, r))
    assert "fused_norm" not in str(program.graph)
    for a, e in zip(program.module()(x, r), block(x, r), strict=True):
        torch.testing.assert_close(a, e)


@both_ops
def test_jit_trace(op: str, place) -> None:
    x, r, params = _inputs(op, 4, 16, torch.float32, place.device)
    traced = torch.jit.trace(lambda x, r: _call(op, x, r, params), (x, r))
    for a, e in zip(traced(r, x), _call(op, r, x, params), strict=True):
        torch.testing.assert_close(a, e)


@both_ops
def test_cpu_autocast_leaves_dtypes_alone(op: str, place) -> None:
    if place.device != "cpu":
        pytest.skip("CUDA autocast has its own rule")
    x, r, params = _inputs(op, 4, 16, torch.float32, place.device)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, summed = _call(op, x.bfloat16(), r, params)
        assert y.dtype == summed.dtype == torch.float32
        y, summed = _call(op, x.bfloat16(), r.bfloat16(), [p.bfloat16() for p in params])
        assert y.dtype == summed.dtype == torch.bfloat16


@pytest.mark.gpu
@both_ops
def test_cuda_autocast_is_that_of_the_parts(op: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    x, r, params = _inputs(op, 4, 16, torch.float32, "cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for a, b in ((x.bfloat16(), r), (x.bfloat16(), r.bfloat16())):
            for ours, theirs in zip(_call(op, a, b, params), _parts(op, a, b, params), strict=True):
                assert ours.dtype == theirs.dtype
                torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


@both_ops
def test_a_tensor_subclass_goes_to_torchs_operations(op: str, place) -> None:
    seen = []

    class Logged(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(getattr(func, "__name__", str(func)))
            return super().__torch_function__(func, types, args, kwargs or {})

    x, r, params = _inputs(op, 4, 16, torch.float32, place.device)
    y, summed = _call(op, x.as_subclass(Logged), r, params, dropout_p=0.5)
    assert isinstance(y, Logged) and isinstance(summed, Logged)
    assert "dropout" in seen and any("norm" in name for name in seen)


@both_ops
def test_a_function_mode_sees_the_call(op: str, place) -> None:
    from torch.overrides import TorchFunctionMode

    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x, r, params = _inputs(op, 4, 16, torch.float32, place.device)
    with Mode():
        y, _ = _call(op, x, r, params, dropout_p=0.25)
    assert getattr(FF, op) in seen and y.shape == x.shape


@both_ops
def test_meta_and_empty(op: str, place) -> None:
    x, r, params = _inputs(op, 4, 16, torch.float32, place.device)
    with fused_norm.use_backend("auto"):
        outputs = _call(op, *(t.to("meta") for t in (x, r)), [p.to("meta") for p in params], dropout_p=0.1)
    assert all(o.device.type == "meta" and o.shape == x.shape for o in outputs)
    leaves = [leaf(t) for t in (x[:0], r[:0], *params)]
    y, summed = _call(op, *leaves[:2], leaves[2:], dropout_p=0.1)
    assert y.shape == summed.shape == (0, 16)
    for g, t in zip(torch.autograd.grad(y.sum() + summed.sum(), leaves), leaves, strict=True):
        assert_same_bits(g, torch.zeros_like(t))


@both_ops
def test_broadcasting_is_that_of_plus(op: str, place) -> None:
    x, r, params = _inputs(op, 4, 16, torch.float64, place.device)
    a, b = leaf(x), leaf(r[:1])
    y, summed = _call(op, a, b, params)
    expected = _parts(op, a, b, params)
    for ours, theirs in zip((y, summed), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(
        *(torch.autograd.grad(o[0].sin().sum() + o[1].cos().sum(), (a, b)) for o in ((y, summed), expected)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@both_ops
def test_writing_over_the_outputs(op: str, place) -> None:
    """The sum is saved for backward, the output is not: as torch's norm saves its input."""
    x, r, params = _inputs(op, 4, 16, torch.float32, place.device)
    leaves = [leaf(x), leaf(r)]
    y, _ = _call(op, *leaves, params)
    y.mul_(2)
    torch.autograd.grad(y.sum(), leaves)
    y, summed = _call(op, *leaves, params)
    summed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), leaves)


@both_ops
def test_errors_name_both_values(op: str, place) -> None:
    x, r, params = _inputs(op, 4, 16, torch.float32, place.device)
    function = getattr(FF, op)
    cases = [
        ((x, r[:, :8], (16,)), RuntimeError, ("16", "8")),
        ((x, r, (8,)), RuntimeError, ("(4, 16)", "(8,)")),
        ((x, r, (16,), params[0][:8]), RuntimeError, ("(8,)", "(16,)")),
        ((x.int(), r.int(), (16,)), NotImplementedError, ("int32",)),
        ((x, r, ()), RuntimeError, ("()",)),
    ]
    for args, cls, words in cases:
        error = exception_of(function, *args)
        assert isinstance(error, cls), (args, error)
        assert all(word in str(error) for word in words), error
    with pytest.raises(ValueError, match=r"weight_offset is 1.0, weight is None"):
        function(x, r, (16,), weight_offset=1.0)


@both_ops
def test_two_runs_and_batches_of_any_size_give_the_same_bits(op: str, place) -> None:
    if place.backend == "torch":
        pytest.skip("torch's own kernels promise nothing")
    x, r, params = _inputs(op, 33, 768, torch.float32, place.device)
    y, summed = _call(op, x, r, params)
    for rows in (1, 2, 16):
        part, part_summed = _call(op, x[:rows], r[:rows], params)
        assert_same_bits(part, y[:rows])
        assert_same_bits(part_summed, summed[:rows])


# ---------------------------------------------------------------------------------------------------------- modules


@pytest.mark.parametrize("name", ["AddLayerNorm", "AddRMSNorm"])
def test_modules(name: str, place) -> None:
    cls, theirs = getattr(fused_norm, name), getattr(nn, name.removeprefix("Add"))
    module = cls(24, eps=1e-4, p=0.25, device=place.device)
    plain = theirs(24, eps=1e-4, device=place.device)
    assert isinstance(module, theirs) and repr(module) == repr(plain).replace(theirs.__name__, name)[:-1] + ", p=0.25)"
    plain.load_state_dict(module.state_dict())
    x, r = (torch.randn(5, 24, device=place.device) for _ in range(2))
    module.eval()
    y, summed = module(x, r)
    torch.testing.assert_close(y, plain(x + r))
    module.train()
    torch.manual_seed(0)
    y, summed = module(x, r)
    assert not torch.equal(summed, x + r)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.manual_seed(0)
        assert_same_bits(twin(x, r)[1], summed)
    half = copy.deepcopy(module).bfloat16()
    assert half(x.bfloat16(), r.bfloat16())[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"1.5"):
        cls(24, p=1.5)
    shifted = cls(24, weight_offset=1.0, device=place.device).eval()
    assert (shifted.weight == 0).all()
    torch.testing.assert_close(shifted(x, r)[0], theirs(24, device=place.device)(x + r))
