"""Derivatives of every kind: higher backward, forward mode, vmap, torch.func, and mixtures of them.

The truth is the norm as one would write it in eager operations (``composite``), in fp64. It is not ``F.layer_norm``,
whose Hessians under torch.func and whose third derivatives are wrong (seen with torch 2.11 and 2.13).
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from cases import DTYPES, LOW_PRECISION, OPS, call, leaf
from torch import Tensor
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

import fused_norm
import fused_norm.functional as FF
from fused_norm import autograd, autograd_add_norm, reference
from fused_norm.backends import native
from fused_norm.testing import relative_error

pytestmark = pytest.mark.usefixtures("poisoned_empty")

both_ops = pytest.mark.parametrize("op", OPS)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _layer_norm(x: Tensor, shape, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return _affine((x - mean) / (variance + eps).sqrt(), weight, bias)


def _rms_norm(x: Tensor, shape, weight=None, eps: float = 1e-5) -> Tensor:
    return _affine(x / (x.square().mean(-1, keepdim=True) + eps).sqrt(), weight, None)


composite = SimpleNamespace(layer_norm=_layer_norm, rms_norm=_rms_norm)


def _three(device: str, *x_shape: int) -> list[Tensor]:
    """x of ``x_shape``, a weight and a bias."""
    shapes = x_shape or (4, 7), (7,), (7,)
    return [torch.randn(*s, dtype=torch.float64, device=device) for s in shapes]


def _function(op: str, namespace):
    """A scalar function of (x, weight, bias) whose every derivative is busy."""
    return lambda x, w, b: (
        (call(op, namespace, x, (7,), w, b) * torch.arange(1.0, 8.0, dtype=x.dtype, device=x.device)).sin().sum()
    )


def _close(ours, truth) -> None:
    ours, truth = (torch.utils._pytree.tree_leaves(t) for t in (ours, truth))
    assert len(ours) == len(truth) > 0
    assert any(e.abs().max() > 1e-3 for e in truth), "a comparison with zero shows nothing"
    for a, e in zip(ours, truth, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9 * max(1.0, e.abs().max().item()))


def _not_torchs_own(place) -> None:
    if place.backend == "torch":
        pytest.skip("torch's own layer_norm has wrong mixed Hessians under torch.func, and wrong third derivatives")


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch, place):
    """Fails a test whose derivatives leave the backend's kernels for the reference's formulas.

    Where double backward is these formulas by the backend's own choice, the backend alone has them.
    """

    def refused(*args, **kwargs):
        raise AssertionError("the reference's formulas were used in a kernel's place")

    if place.composes:
        monkeypatch.setattr(native, "reference", SimpleNamespace(**vars(reference)))
    if place.backend != "reference":
        for name in ("norm_forward", "norm_backward", "norm_double_backward"):
            monkeypatch.setattr(reference, name, refused)
    return place


# ---------------------------------------------------------------------------------------------------- plain autograd


@both_ops
def test_double_backward(op: str, kernels_only) -> None:
    inputs = _three(kernels_only.device)[: 3 if op == "layer_norm" else 2]
    results = []
    upstream = torch.randn(4, 7, dtype=torch.float64, device=kernels_only.device)
    for namespace in (FF, composite):
        leaves = [leaf(t) for t in inputs]
        dy = leaf(upstream)
        y = call(op, namespace, leaves[0], (7,), *leaves[1:])
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), [leaves[0], leaves[1], dy])
        results.append((first, second))
    _close(*results)


@both_ops
@pytest.mark.parametrize("reached", [s for s in itertools.product([False, True], repeat=3) if any(s)], ids=str)
def test_double_backward_of_every_subset(op: str, reached, kernels_only) -> None:
    """``reached``: which of dx, dw, db the second loss uses; for every subset of x, weight, dy to differentiate."""
    count = 3 if op == "layer_norm" else 2
    if not any(reached[:count]):
        pytest.skip("rms_norm has no db")
    inputs = _three(kernels_only.device)[:count]
    upstream = torch.randn(4, 7, dtype=torch.float64, device=kernels_only.device)
    for wanted in itertools.product([False, True], repeat=3):
        if not any(wanted):
            continue
        results = []
        for namespace in (FF, composite):
            leaves, dy = [leaf(t) for t in inputs], leaf(upstream)
            y = call(op, namespace, leaves[0], (7,), *leaves[1:])
            first = torch.autograd.grad(y, leaves, dy, create_graph=True)
            loss = sum(g.sin().sum() for g, r in zip(first, reached, strict=False) if r)
            targets = [t for t, w in zip((leaves[0], leaves[1], dy), wanted, strict=True) if w]
            results.append(torch.autograd.grad(loss, targets, materialize_grads=True))
        ours, truth = results
        for a, e in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@both_ops
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("param_dtype", [None, torch.float32], ids=["", "fp32 parameters"])
@pytest.mark.parametrize("rows, n", [(1, 1), (5, 63), (17, 768), (3, 4097)])
def test_accuracy_of_double_backward_and_forward_mode(op: str, rows, n, dtype, param_dtype, kernels_only) -> None:
    """Within a few roundings of the fp64 truth of these very inputs, in every dtype."""
    if param_dtype is not None and dtype not in LOW_PRECISION:
        pytest.skip("fp32 parameters go with bf16 and fp16 input")
    _not_torchs_own(kernels_only)
    if n == 1 and op == "rms_norm":
        pytest.skip("dx is nothing but cancellation there (tests/cases.py)")

    def draw(*shape: int, like: torch.dtype) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(kernels_only.device, like)

    params = param_dtype or dtype
    x, dy, ddx = (draw(rows, n, like=dtype) for _ in range(3))
    x = x + 0.5
    weight, bias, ddw, ddb = (draw(n, like=params) for _ in range(4))
    count = 3 if op == "layer_norm" else 2

    def second(namespace, *tensors: Tensor):
        x, weight, bias, dy, ddx, ddw, ddb = tensors
        leaves, dy = [leaf(t) for t in (x, weight, bias)[:count]], leaf(dy)
        first = torch.autograd.grad(call(op, namespace, leaves[0], (n,), *leaves[1:]), leaves, dy, create_graph=True)
        return torch.autograd.grad(first, [leaves[0], leaves[1], dy], [ddx, ddw, ddb][:count])

    def tangent(namespace, *tensors: Tensor):
        x, weight, bias, _, dx, dw, db = tensors
        with fwAD.dual_level():
            duals = [fwAD.make_dual(p, t) for p, t in ((x, dx), (weight, dw), (bias, db))[:count]]
            return fwAD.unpack_dual(call(op, namespace, duals[0], (n,), *duals[1:])).tangent

    given = x, weight, bias, dy, ddx, ddw, ddb
    ours = *second(FF, *given), tangent(FF, *given)
    # With one row of one element everything but ddb and its like is zero but for eps; the scale is that of the terms.
    truth_inputs = [t.double() for t in given]
    truth = *second(composite, *truth_inputs), tangent(composite, *truth_inputs)
    for name, a, e in zip(("x", "weight", "dy", "tangent"), ours, truth, strict=True):
        out_dtype = params if name == "weight" else dtype
        assert a.dtype == out_dtype, name
        limit = 16 * torch.finfo(out_dtype).eps
        if n == 1:
            assert ((a.double() - e).abs() <= limit * (1 + e.abs())).all(), name
        else:
            assert relative_error(a, e) <= limit, (name, relative_error(a, e), limit)


@both_ops
def test_layouts_of_second_order_inputs(op: str, kernels_only) -> None:
    """Transposed, expanded and sliced gradients reach double backward; an expanded ddw too."""
    device = kernels_only.device
    x, w = leaf(torch.randn(7, 4, dtype=torch.float64, device=device)), leaf(_three(device)[1])
    wide = torch.randn(4, 14, dtype=torch.float64, device=device)
    for upstream in (wide[:, ::2], wide.t()[:7].t(), wide[:1, :7].expand(4, 7), wide[:, 3:10]):
        results = []
        for namespace in (FF, composite):
            dy = leaf(torch.ones(4, 7, dtype=torch.float64, device=device))
            y = call(op, namespace, x.t(), (7,), w)
            first = torch.autograd.grad(y, (x, w), dy, create_graph=True)
            ddw = upstream[0, 0].expand(7)
            results.append(torch.autograd.grad(first, (x, w, dy), (upstream.t(), ddw)))
        _close(*results)


@both_ops
def test_gradient_penalty_reaches_the_parameters(op: str, place) -> None:
    """Reverse over reverse through ``.backward(create_graph=True)`` in fp32."""
    start, weight = torch.randn(4, 7, device=place.device), torch.randn(7, device=place.device)
    results = []
    for namespace, dtype in ((FF, torch.float32), (composite, torch.float64)):
        x, w = leaf(start.to(dtype)), leaf(weight.to(dtype))
        (dx,) = torch.autograd.grad(call(op, namespace, x, (7,), w).sin().sum(), x, create_graph=True)
        dx.square().sum().backward()
        results.append((x.grad, w.grad))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e.float(), rtol=1e-4, atol=1e-4)


@both_ops
def test_third_and_fourth_derivatives(op: str, place) -> None:
    _not_torchs_own(place)
    start = _three(place.device)
    results = []
    for namespace in (FF, composite):
        x, w, b = (leaf(t) for t in start)
        value = _function(op, namespace)(x, w, b)
        for _ in range(3):
            dx, dw = torch.autograd.grad(value, (x, w), create_graph=True)
            value = dx.square().sum() + dw.sin().sum()
        results.append(torch.autograd.grad(value, (x, w)))
    _close(*results)


@both_ops
def test_a_second_backward_through_the_kept_graph(op: str, place) -> None:
    """The same bits again, with and without create_graph in between."""
    x, w = (leaf(t) for t in _three(place.device)[:2])
    y = call(op, FF, x, (7,), w)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, (x, w), dy, retain_graph=True)
    graph = torch.autograd.grad(y, (x, w), dy, create_graph=True)
    again = torch.autograd.grad(y, (x, w), dy)
    for a, b, c in zip(first, graph, again, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(a, b.detach())


@both_ops
def test_batched_gradients(op: str, place) -> None:
    """``is_grads_batched`` runs backward under an older vmap, whose tensors have no memory a kernel could read."""
    upstream = torch.randn(5, 4, 7, dtype=torch.float64, device=place.device)
    inputs = _three(place.device)[: 3 if op == "layer_norm" else 2]
    for create_graph in (False, True):
        results = []
        for namespace in (FF, composite):
            leaves = [leaf(t) for t in inputs]
            y = call(op, namespace, leaves[0], (7,), *leaves[1:])
            options = {"is_grads_batched": True, "create_graph": create_graph}
            grads = torch.autograd.grad(y, leaves, upstream, **options)
            results.append(grads)
            if create_graph:  # the graph must go on through the older vmap
                results[-1] += torch.autograd.grad(sum(g.sin().sum() for g in grads), leaves[:2])
        _close(*results)


# ------------------------------------------------------------------------------------------------------ forward mode


@both_ops
def test_forward_mode(op: str, kernels_only) -> None:
    """Dual numbers in every subset of the inputs, with and without requires_grad."""
    inputs = _three(kernels_only.device)[: 3 if op == "layer_norm" else 2]
    tangents = [torch.randn_like(t) for t in inputs]
    for subset in itertools.product([False, True], repeat=len(inputs)):
        if not any(subset):
            continue
        for requires_grad in (False, True):
            results = []
            for namespace in (FF, composite):
                leaves = [t.clone().requires_grad_(requires_grad) for t in inputs]
                with fwAD.dual_level():
                    duals = [fwAD.make_dual(t, d) if s else t for t, d, s in zip(leaves, tangents, subset, strict=True)]
                    y = call(op, namespace, duals[0], (7,), *duals[1:])
                    results.append(tuple(t.detach() for t in fwAD.unpack_dual(y)))
            _close(*results)


@both_ops
def test_forward_over_reverse_with_dual_numbers(op: str, kernels_only) -> None:
    """Every subset of x, weight and dy with a tangent, through autograd.grad(create_graph=True)."""
    _not_torchs_own(kernels_only)
    count = 3 if op == "layer_norm" else 2
    inputs = _three(kernels_only.device)[:count]
    upstream = torch.randn(4, 7, dtype=torch.float64, device=kernels_only.device)
    tangents = [torch.randn_like(t) for t in (*inputs, upstream)]
    for subset in itertools.product([False, True], repeat=count + 1):
        if not any(subset):
            continue
        results = []
        for namespace in (FF, composite):
            leaves = [leaf(t) for t in (*inputs, upstream)]
            with fwAD.dual_level():
                *duals, dy = (
                    fwAD.make_dual(t, d) if s else t for t, d, s in zip(leaves, tangents, subset, strict=True)
                )
                y = call(op, namespace, duals[0], (7,), *duals[1:])
                first = torch.autograd.grad(y, duals, dy, create_graph=True)
                unpacked = [fwAD.unpack_dual(g) for g in first]
                zeros = torch.zeros_like
                results.append([zeros(u.primal) if u.tangent is None else u.tangent.detach() for u in unpacked])
        ours, truth = results
        for a, e in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@both_ops
def test_reverse_over_forward(op: str, kernels_only) -> None:
    _not_torchs_own(kernels_only)
    inputs = _three(kernels_only.device)
    tangents = [torch.randn_like(t) for t in inputs]
    results = []
    for namespace in (FF, composite):
        leaves, directions = [leaf(t) for t in inputs[:2]], [leaf(t) for t in tangents[:2]]
        with fwAD.dual_level():
            x, w = (fwAD.make_dual(t, d) for t, d in zip(leaves, directions, strict=True))
            y = fwAD.unpack_dual(call(op, namespace, x, (7,), w)).tangent
        # Outside, where the tangents are gone: inside, torch would differentiate these gradients forward once more.
        results.append(torch.autograd.grad(y.sin().sum(), [*leaves, *directions]))
    _close(*results)
    for wanted in range(2):  # x alone, the weight alone
        results = []
        for namespace in (FF, composite):
            leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(inputs[:2])]
            with fwAD.dual_level():
                x, w = (fwAD.make_dual(t, d) for t, d in zip(leaves, tangents, strict=False))
                y = fwAD.unpack_dual(call(op, namespace, x, (7,), w)).tangent
            results.append(torch.autograd.grad(y.sin().sum(), leaves[wanted]))
        _close(*results)


# --------------------------------------------------------------------------------------------------------- torch.func

TRANSFORMS = {
    "grad": lambda f, a: grad(f, argnums=(0, 1))(*a),
    "vjp": lambda f, a: vjp(f, *a)[1](torch.ones((), dtype=a[0].dtype, device=a[0].device))[:2],
    "jvp": lambda f, a: jvp(f, tuple(a), tuple(torch.ones_like(t) * (i + 1) + t for i, t in enumerate(a))),
    "jacrev": lambda f, a: jacrev(f, argnums=(0, 1))(*a),
    "jacfwd": lambda f, a: jacfwd(f, argnums=(0, 1))(*a),
    "linearize": lambda f, a: linearize(f, *a)[1](*a),
    "vmap over x": lambda f, a: vmap(f, in_dims=(0, None, None))(torch.stack([a[0], a[0] * 2, a[0] - 1]), *a[1:]),
    "vmap over weight": lambda f, a: vmap(f, in_dims=(None, 0, None))(a[0], torch.stack([a[1], a[1] * 2]), a[2]),
    "vmap over all": lambda f, a: vmap(f)(*(torch.stack([t, t * 2, t - 1]) for t in a)),
    "vmap over an inner dimension": lambda f, a: vmap(f, in_dims=(1, None, None))(
        torch.stack([a[0], a[0] * 2], 1), *a[1:]
    ),
    "per-sample gradients": lambda f, a: vmap(grad(f, argnums=(0, 1)), in_dims=(0, None, None))(a[0], *a[1:]),
    "chunked vmap": lambda f, a: vmap(grad(f, argnums=(0, 1)), in_dims=(0, None, None), chunk_size=3)(a[0], *a[1:]),
}

HIGHER = {
    "grad of grad": lambda f, a: grad(lambda *b: grad(f)(*b).sin().sum(), argnums=1)(*a),
    "hessian": lambda f, a: hessian(f, argnums=(0, 1))(*a),
    "reverse over reverse": lambda f, a: jacrev(jacrev(f, (0, 1)), (0, 1))(*a),
    "reverse over forward": lambda f, a: jacrev(jacfwd(f, (0, 1)), (0, 1))(*a),
    "forward over forward": lambda f, a: jacfwd(jacfwd(f, (0, 1)), (0, 1))(*a),
    "Hessian-vector product": lambda f, a: jvp(grad(f, (0, 1)), tuple(a), tuple(t.cos() for t in a))[1],
    "per-sample Hessian": lambda f, a: vmap(hessian(f, (0, 1)), in_dims=(0, None, None))(a[0], *a[1:]),
    "Hessian for each weight": lambda f, a: vmap(hessian(f, (0, 1)), (None, 0, None))(
        a[0][0], torch.stack([a[1], a[1] * 2]), a[2]
    ),
}


@both_ops
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(op: str, transform: str, kernels_only) -> None:
    """Right values, never silent zeros, by the backend's kernels."""
    inputs = _three(kernels_only.device)
    _close(TRANSFORMS[transform](_function(op, FF), inputs), TRANSFORMS[transform](_function(op, composite), inputs))


@both_ops
@pytest.mark.parametrize("transform", HIGHER)
def test_second_order_torch_func(op: str, transform: str, place, request) -> None:
    _not_torchs_own(place)
    if transform != "forward over forward":  # it takes the reference's formulas
        request.getfixturevalue("kernels_only")
    inputs = _three(place.device, 3, 7)
    _close(HIGHER[transform](_function(op, FF), inputs), HIGHER[transform](_function(op, composite), inputs))


@both_ops
@pytest.mark.parametrize(
    "modes", list(itertools.product((jacrev, jacfwd), repeat=3)), ids=lambda m: "-".join(f.__name__ for f in m)
)
def test_third_order_torch_func(op: str, modes, place) -> None:
    """Each mixture of reverse and forward mode. (Nested forward mode sees zeros if a jvp rule forgets the levels.)"""
    _not_torchs_own(place)
    outer, middle, inner = modes
    inputs = _three(place.device, 2, 7)

    def third(namespace):
        return outer(middle(inner(_function(op, namespace), (0, 1)), 0), (0, 1))(*inputs)

    _close(third(FF), third(composite))


def _batched(t: Tensor, dim: int | None, size: int) -> Tensor:
    """``t`` as it is, or ``size`` tensors like it that differ, along ``dim``."""
    return t if dim is None else torch.randn(size, *t.shape, dtype=t.dtype, device=t.device).movedim(0, dim)


DIMS = [d for d in itertools.product((None, 0, 2), (None, 0), (None, 1)) if d != (None, None, None)]


@both_ops
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_vmap_over_any_inputs(op: str, dims, kernels_only) -> None:
    """Forward, gradients under vmap, and vmap under gradients, for a batch along any dimension of any inputs."""
    inputs = [_batched(t, d, 3) for t, d in zip(_three(kernels_only.device, 2, 4, 7), dims, strict=True)]

    def results(namespace):
        f = _function(op, namespace)
        yield vmap(lambda *t: call(op, namespace, t[0], (7,), *t[1:]), dims)(*inputs)
        yield vmap(grad(f, (0, 1)), dims)(*inputs)
        yield grad(lambda *t: vmap(f, dims)(*t).sin().sum(), (0, 1))(*inputs)
        yield vmap(lambda *t: jvp(f, t, tuple(u.cos() for u in t))[1], dims)(*inputs)

    _close(list(results(FF)), list(results(composite)))


def _hvp(f):
    return lambda *tensors: jvp(grad(f, (0, 1)), tensors, tuple(t.cos() for t in tensors))[1]


SOME = [d for d in itertools.product((None, 0), repeat=3) if any(i is not None for i in d)]


@both_ops
@pytest.mark.parametrize("outer", SOME, ids=str)
def test_nested_vmap(op: str, outer, kernels_only) -> None:
    """Parameters batched at one level and shared at the other: groups of groups."""
    _not_torchs_own(kernels_only)
    for inner in SOME:
        inputs = _three(kernels_only.device, 2, 7)
        inputs = [_batched(_batched(t, i, 2), o, 3) for t, i, o in zip(inputs, inner, outer, strict=True)]
        results = []
        for namespace in (FF, composite):
            f = _function(op, namespace)
            batched = vmap(vmap(f, inner), outer)
            results.append(
                (
                    vmap(vmap(grad(f, (0, 1)), inner), outer)(*inputs),
                    grad(lambda *tensors, batched=batched: batched(*tensors).sum(), (0, 1))(*inputs),
                    vmap(vmap(_hvp(f), inner), outer)(*inputs),
                )
            )
        _close(*results)


@both_ops
def test_functional_call_with_stacked_parameters(op: str, kernels_only) -> None:
    """An ensemble: one call of the module for many sets of parameters."""
    ours, theirs = {
        "layer_norm": (fused_norm.LayerNorm, torch.nn.LayerNorm),
        "rms_norm": (fused_norm.RMSNorm, torch.nn.RMSNorm),
    }[op]
    results = []
    x = torch.randn(4, 7, dtype=torch.float64, device=kernels_only.device)
    state = None
    for kind in (ours, theirs):
        modules = [kind(7, eps=1e-5, dtype=torch.float64, device=kernels_only.device) for _ in range(3)]
        if state is None:
            params, _ = stack_module_state(modules)
            state = {k: torch.randn_like(p) for k, p in params.items()}

        def run(state, x, module=modules[0]):
            return functional_call(module, (state, {}), (x,))

        results.append(
            (vmap(run, (0, None))(state, x), vmap(grad(lambda *a: run(*a).sin().sum()), (0, None))(state, x))
        )
    _close(*results)


@both_ops
@pytest.mark.parametrize("x_shape", [(7,), (1, 7)], ids=str)
def test_vmap_over_derivatives_of_a_single_row(op: str, x_shape, kernels_only) -> None:
    """Statistics of one row, expanded over a batch of cotangents, are a view without strides of their own."""
    _not_torchs_own(kernels_only)
    inputs = _three(kernels_only.device, *x_shape)
    for transform in (jacrev, jacfwd, hessian):
        _close(*(transform(_function(op, namespace), (0, 1))(*inputs) for namespace in (FF, composite)))
    directions = torch.randn(3, *x_shape, dtype=torch.float64, device=kernels_only.device)
    results = []
    for namespace in (FF, composite):
        _, pullback = vjp(lambda x, ns=namespace: call(op, ns, x, (7,), *inputs[1:]), inputs[0])
        results.append(vmap(pullback)(directions))
    _close(*results)


@both_ops
@pytest.mark.parametrize("dims", [(0, None, None), (None, 0, None), (0, 0, 0)], ids=str)
def test_vmap_over_a_batch_of_none(op: str, dims, place) -> None:
    inputs = [_batched(t, d, 2) if d is not None else t for t, d in zip(_three(place.device), dims, strict=True)]
    inputs = [t[:0] if d is not None else t for t, d in zip(inputs, dims, strict=True)]

    def results(namespace):
        f = _function(op, namespace)
        yield vmap(lambda *t: call(op, namespace, t[0], (7,), *t[1:]), dims)(*inputs)
        yield vmap(grad(f, (0, 1)), dims)(*inputs)
        yield grad(lambda *t: vmap(f, dims)(*t).sum(), (0, 1))(*inputs)
        yield vmap(lambda *t: jvp(grad(f, (0, 1)), t, tuple(u.cos() for u in t))[1], dims)(*inputs)

    ours, truth = (torch.utils._pytree.tree_leaves(list(results(namespace))) for namespace in (FF, composite))
    for a, e in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, e)


@both_ops
def test_the_older_vmap(op: str, place) -> None:
    from torch._vmap_internals import _vmap

    results = []
    start = torch.randn(3, 4, 7, dtype=torch.float64, device=place.device)
    w = _three(place.device)[1]
    for namespace in (FF, composite):
        x = leaf(start)
        y = _vmap(lambda x, ns=namespace: call(op, ns, x, (7,), w))(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), x)))
    _close(*results)


@both_ops
def test_functionalize(op: str, place) -> None:
    """torch.func.functionalize, which takes no autograd.Function, around and inside other transforms."""
    inputs = _three(place.device)
    f = _function(op, FF)
    gradients = grad(_function(op, composite), (0, 1))(*inputs)
    _close(functionalize(grad(f, (0, 1)))(*inputs), gradients)
    _close(grad(functionalize(f), (0, 1))(*inputs), gradients)
    _close(
        functionalize(lambda *t: call(op, FF, t[0], (7,), *t[1:]))(*inputs),
        call(op, composite, inputs[0], (7,), *inputs[1:]),
    )


@both_ops
def test_saved_tensors_that_come_back_in_another_layout(op: str, place) -> None:
    x, w, dy = (torch.randn(*s, dtype=torch.float64, device=place.device) for s in ((4, 2, 4), (2, 4), (4, 2, 4)))

    def turned(t: Tensor) -> Tensor:
        return t.t().contiguous() if t.dim() == 2 else t

    leaves = leaf(x), leaf(w)
    with torch.autograd.graph.saved_tensors_hooks(turned, lambda t: t.t() if t.dim() == 2 else t):
        y = call(op, FF, leaves[0], (2, 4), leaves[1])
    expected = (leaf(x), leaf(w))
    z = call(op, FF, expected[0], (2, 4), expected[1])
    _close(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(z, expected, dy))


@both_ops
def test_forward_over_forward_of_a_view_with_a_pending_minus(op: str, place) -> None:
    _not_torchs_own(place)
    x = torch.randn(3, 7, dtype=torch.complex128, device=place.device).conj().imag
    _, w, b = _three(place.device)
    ours, truth = (jacfwd(jacfwd(_function(op, ns)))(x, w, b) for ns in (FF, composite))
    _close(ours, truth)


def test_saved_wrappers_that_outlive_their_transform(place) -> None:
    """A tensor that escapes torch.func.grad is a dead wrapper: torch's operators unwrap it, and so do we."""
    escaped = []

    def f(x):
        escaped.append(x)
        return x.sin().sum()

    x = torch.randn(4, 7, dtype=torch.float64, device=place.device)
    grad(f)(x)
    y = FF.layer_norm(escaped[0], (7,))
    torch.testing.assert_close(y, composite.layer_norm(x, (7,)))
    assert not y.requires_grad
    _, pullback = vjp(lambda x: FF.layer_norm(x, (7,)), x)
    (first,) = pullback(x.cos())
    (expected,) = vjp(lambda x: composite.layer_norm(x, (7,)), x)[1](x.cos())
    torch.testing.assert_close(first, expected)


def test_jacobian_of_torch_autograd_functional(place) -> None:
    x = torch.randn(2, 5, dtype=torch.float64, device=place.device)
    for options in ({}, {"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}, {"create_graph": True}):
        ours, theirs = (
            torch.autograd.functional.jacobian(
                lambda t, ns=ns: ns.layer_norm(t, (5,)), x.clone().requires_grad_(), **options
            )
            for ns in (FF, composite)
        )
        _close(ours, theirs)


def test_a_backend_without_a_kernel_is_not_used_in_silence(kernels_only) -> None:
    """The fixture above sees the reference: it refuses where a derivative has no kernel (the third)."""
    if kernels_only.backend == "torch":
        pytest.skip("torch's own function")
    x = leaf(torch.randn(2, 7, dtype=torch.float64, device=kernels_only.device))
    (dx,) = torch.autograd.grad(FF.layer_norm(x, (7,)).sin().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sin().sum(), x, create_graph=True)
    if kernels_only.backend == "reference":
        assert torch.autograd.grad(ddx.sum(), x)[0].isfinite().all()
        return
    with pytest.raises(AssertionError, match="in a kernel's place"):
        torch.autograd.grad(ddx.sum(), x)


def test_each_function_has_all_rules() -> None:
    """So that a new operation is not left without one: torch would raise, or give zeros, only when it is needed.

    But for those that stand aside wherever a transform or forward mode is under way.
    """
    reverse_alone = {autograd.NormKeepingOutput, autograd_add_norm.AddNorm}
    assert reverse_alone < set(autograd.Function.__subclasses__())
    for function in set(autograd.Function.__subclasses__()) - reverse_alone:
        for rule in ("forward", "setup_context", "backward", "jvp", "vmap"):
            assert rule in vars(function), (function, rule)
