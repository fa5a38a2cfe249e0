"""FF.layer_norm and FF.rms_norm as drop-ins for torch's: accuracy, layouts, gradients, determinism, transforms."""

from __future__ import annotations

import itertools
import warnings
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    LOW_PRECISION,
    OPS,
    NormCase,
    assert_same_bits,
    call,
    check,
    draw,
    has_bias,
    leaf,
    norm_cases,
    run,
)
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import fused_norm
import fused_norm.functional as FF
from fused_norm.testing import relative_error

pytestmark = pytest.mark.usefixtures("poisoned_empty")

both_ops = pytest.mark.parametrize("op", OPS)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


# ------------------------------------------------------------------------------------------------------------ accuracy


@pytest.mark.parametrize("case", norm_cases(), ids=str)
def test_accuracy(case: NormCase, place) -> None:
    """Output and gradients lie as near the fp64 truth as the rule of ``fused_norm.testing`` demands."""
    inputs = draw(case, place.device)
    check(case, inputs, run(case, inputs), is_torch=place.backend == "torch")


@both_ops
def test_parameter_gradients_of_many_rows(op: str, place) -> None:
    """torch's own CPU kernel is off by 7 % here; the rule asks for three roundings, half a per cent."""
    if place.backend in ("torch", "reference"):
        pytest.skip("torch's kernels, and the formulas of the truth itself")
    case = NormCase(op, 8192, 768, torch.bfloat16)
    inputs = draw(case, place.device)
    check(case, inputs, run(case, inputs))


@pytest.mark.parametrize("n", [512, 768, 5000])
def test_large_offset(n: int, place) -> None:
    """E[x^2] - E[x]^2 would lose every digit of the variance here."""
    x = torch.randn(16, n, device=place.device) + 1e6
    y = FF.layer_norm(x, (n,)).double()
    spread = y.std(-1, unbiased=False)
    assert (spread - 1).abs().max() < 1e-2
    truth = F.layer_norm(x.double(), (n,))
    if place.backend != "torch":
        assert (y - truth).abs().max() < 0.75 * 0.0625  # the fp32 mean is a multiple of 1/16


@pytest.mark.parametrize("n", [64, 768, 65537])
def test_first_element_far_from_the_rest(n: int, place) -> None:
    """The mean is summed about the first element; that must cost no digits when it is an outlier."""
    x = torch.randn(8, n)
    x[:, 0] += 100
    x = x.to(place.device)
    truth = F.layer_norm(x.double(), (n,))
    limit = max(1.5 * relative_error(F.layer_norm(x, (n,)), truth), 2e-7)
    assert relative_error(FF.layer_norm(x, (n,)), truth) <= limit


@all_dtypes
def test_large_and_small_values_do_not_overflow(dtype: torch.dtype, place) -> None:
    """Sums of squares of fp16's largest numbers fit the dtype of the arithmetic, and not fp16."""
    x = (torch.randn(3, 300, dtype=torch.float64) * 2e4).clamp(-6e4, 6e4).to(place.device, dtype)
    for op in OPS:
        truth = call(op, F, x.double(), (300,))
        torch.testing.assert_close(call(op, FF, x, (300,)).double(), truth, rtol=8 * torch.finfo(dtype).eps, atol=1e-3)


# ------------------------------------------------------------------------------------------------- normalized_shape


@both_ops
@pytest.mark.parametrize("shape", [(6,), (4, 6), (3, 4, 6), (2, 3, 4, 6)], ids=str)
def test_normalized_shape_of_several_dimensions(op: str, shape: tuple[int, ...], place) -> None:
    x = torch.randn(2, 3, 4, 6, device=place.device)
    w, b = torch.randn(shape, device=place.device), torch.randn(shape, device=place.device)
    dy = torch.randn_like(x)
    results = []
    for namespace in (FF, F):
        leaves = [leaf(x), leaf(w)] + ([leaf(b)] if op == "layer_norm" else [])
        y = call(op, namespace, leaves[0], shape, *leaves[1:])
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    for a, e in zip(*results, strict=True):
        assert a.shape == e.shape
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@both_ops
@all_dtypes
@pytest.mark.parametrize(
    "shape, normalized",
    [((0, 5), (5,)), ((3, 0), (0,)), ((0, 0), (0,)), ((2, 0, 4), (4,)), ((2, 0, 4), (0, 4)), ((2, 3, 0), (3, 0))],
    ids=str,
)
def test_empty(op: str, dtype: torch.dtype, shape, normalized, place) -> None:
    """No rows or no columns: right shapes, and gradients of zeros rather than None."""
    x = torch.empty(shape, dtype=dtype, device=place.device, requires_grad=True)
    w, b = (torch.randn(normalized, dtype=dtype, device=place.device, requires_grad=True) for _ in range(2))
    y = call(op, FF, x, normalized, w, b)
    assert y.shape == x.shape and y.dtype == dtype and y.is_contiguous()
    y.backward(torch.randn_like(y))
    assert x.grad.shape == x.shape and x.grad.dtype == dtype
    assert_same_bits(w.grad, torch.zeros_like(w), "dw")
    if op == "layer_norm":
        assert_same_bits(b.grad, torch.zeros_like(b), "db")


# ----------------------------------------------------------------------------------------------------------- layouts


def _layouts(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Views with the values of their own ``.clone()``, in every layout users make."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

    return {
        "contiguous": randn(6, 40),
        "transposed": randn(40, 6).t(),
        "rows permuted": randn(4, 6, 40).transpose(0, 1),
        "channels last": randn(2, 6, 5, 40).to(memory_format=torch.channels_last),
        "row-strided": randn(6, 80)[:, :40],
        "row-strided, misaligned": randn(6, 81)[:, 3:43],
        "row-strided, 3-d": randn(2, 3, 77)[..., 5:45],
        "every other row": randn(12, 40)[::2],
        "every other column": randn(6, 80)[:, ::2],
        "misaligned": randn(6 * 40 + 1)[1:].view(6, 40),
        "expanded rows": randn(1, 40).expand(6, 40),
        "expanded columns": randn(6, 1).expand(6, 40),
        "expanded in the middle": randn(3, 1, 40).expand(3, 2, 40),
        "one row of many": randn(6, 40)[3:4],
        "overlapping windows": randn(45).unfold(0, 40, 1),
        "1-d": randn(40),
        "1-d strided": randn(80)[::2],
        "0 stride of a single row": randn(40).as_strided((1, 40), (0, 1)),
    }


LAYOUTS = tuple(_layouts("cpu", torch.float32))


@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of", ["x", "dy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(op: str, layout: str, of: str, dtype: torch.dtype, place) -> None:
    """A view of x, or of the upstream gradient, gives the bits that its contiguous copy gives."""
    view = _layouts(place.device, dtype)[layout]
    other = torch.randn(view.shape).to(view)
    n = view.shape[-1]
    w = torch.randn(n).to(view)
    b = torch.randn(n).to(view) if op == "layer_norm" else None

    def results(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        params = [leaf(p) for p in (w, b) if p is not None]
        y = call(op, FF, x, (n,), *params)
        assert y.is_contiguous()
        return y, *torch.autograd.grad(y, (x, *params), dy)

    flat = view.clone(memory_format=torch.contiguous_format)
    got = results(view, other) if of == "x" else results(other, view)
    expected = results(flat, other) if of == "x" else results(other, flat)
    for a, e, name in zip(got, expected, ("y", "dx", "dw", "db"), strict=False):
        assert a.dtype == dtype and a.shape == e.shape
        if place.backend in ("torch", "reference"):  # eager operations may add up in another order
            torch.testing.assert_close(a, e, rtol=4 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)
        else:
            assert_same_bits(a, e, name)


@both_ops
@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 40)], ids=str)
def test_row_strided_input_is_not_copied(op: str, shape: tuple[int, ...], reference_calls) -> None:
    """The kernel sees the rows where they lie, in forward and in backward, for x and for the upstream gradient."""
    x = torch.randn(*shape[:-1], 77)[..., 5:45].requires_grad_()
    dy = torch.randn(*shape[:-1], 51)[..., 1:41]
    with fused_norm.use_backend("reference"):
        call(op, FF, x, (40,)).backward(dy)
    (forward,), (backward,) = reference_calls.forward, reference_calls.backward
    assert forward.x.data_ptr() == x.data_ptr() and forward.x.shape == (6, 40) and forward.x.stride() == (77, 1)
    assert backward.x.data_ptr() == x.data_ptr()
    assert backward.dy.data_ptr() == dy.data_ptr() and backward.dy.stride() == (51, 1)


@both_ops
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_see_what_the_contract_says(op: str, layout: str, reference_calls) -> None:
    """Contiguous, or 2-D rows of unit stride; parameters contiguous."""
    x = _layouts("cpu", torch.float32)[layout].detach().requires_grad_()
    n = x.shape[-1]
    w = torch.randn(2 * n)[::2].detach().requires_grad_()
    with fused_norm.use_backend("reference"):
        call(op, FF, x, (n,), w).backward(torch.randn(n, *x.shape[:-1]).movedim(0, -1))
    for kernel in (*reference_calls.forward, *reference_calls.backward):
        for t in [kernel.x] + ([kernel.dy] if hasattr(kernel, "dy") else []):
            assert t.is_contiguous() or (t.dim() == 2 and t.stride(1) == 1 and t.shape[1] == n), (t.shape, t.stride())
        assert kernel.weight.is_contiguous() and kernel.weight.numel() == n
    assert len(reference_calls.forward) == len(reference_calls.backward) == 1


@both_ops
@pytest.mark.parametrize("contiguous", [False, True])
def test_views_with_a_pending_minus(op: str, contiguous: bool, place) -> None:
    """``z.conj().imag`` is real, and its minus sign is not in memory: as x, as weight and as upstream gradient."""
    view = torch.randn(6, 40, dtype=torch.complex64, device=place.device).conj().imag
    view = torch._neg_view(torch.randn(6, 40, device=place.device)) if contiguous else view
    plain = view.clone().resolve_neg()
    assert view.is_neg() and not plain.is_neg() and view.is_contiguous() == contiguous
    results = []
    for x, w, dy in (
        (view, plain[0], plain),
        (plain, view[0], plain),
        (plain, plain[0], view),
        (plain, plain[0], plain),
    ):
        x, w = (t.detach().requires_grad_() for t in (x, w))
        y = call(op, FF, x, (40,), w)
        results.append((y, *torch.autograd.grad(y, (x, w), dy)))
    x, w = leaf(plain), leaf(plain[0])
    y = call(op, F, x, (40,), w)
    expected = (y, *torch.autograd.grad(y, (x, w), plain))
    for result in results:
        for a, e in zip(result, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_strided_parameters(place) -> None:
    x = torch.randn(5, 32, device=place.device)
    w, b = torch.randn(32, 2, device=place.device)[:, 0], torch.randn(1, device=place.device).expand(32)
    torch.testing.assert_close(FF.layer_norm(x, (32,), w, b), F.layer_norm(x, (32,), w, b))
    table = torch.randn(8, 4, device=place.device).t()
    torch.testing.assert_close(FF.rms_norm(x.view(5, 4, 8), (4, 8), table), F.rms_norm(x.view(5, 4, 8), (4, 8), table))


@both_ops
def test_output_is_a_fresh_tensor(op: str, place) -> None:
    """Nothing of the input is shared, whatever the layout, and writing to the output leaves the input alone."""
    for name, x in _layouts(place.device, torch.float32).items():
        before = x.clone()
        y = call(op, FF, x, x.shape[-1:])
        assert not y._is_view() and y.data_ptr() != x.data_ptr(), name
        y.fill_(7)
        assert_same_bits(x, before, name)


# --------------------------------------------------------------------------------------------------------- autograd


@both_ops
@pytest.mark.parametrize("subset", list(itertools.product([False, True], repeat=3)), ids=str)
def test_every_requires_grad_subset(op: str, subset: tuple[bool, ...], place) -> None:
    if op == "rms_norm" and subset[2]:
        pytest.skip("rms_norm has no bias")
    tensors = [torch.randn(5, 24, device=place.device), *(torch.randn(24, device=place.device) for _ in range(2))]
    dy = torch.randn(5, 24, device=place.device)
    results = []
    for namespace in (FF, F):
        leaves = [t.clone().requires_grad_(flag) for t, flag in zip(tensors, subset, strict=True)]
        y = call(op, namespace, leaves[0], (24,), *leaves[1:])
        assert y.requires_grad == any(subset)
        if any(subset):
            y.backward(dy)
        results.append([t.grad for t in leaves])
    for ours, theirs, flag in zip(*results, subset, strict=True):
        assert (ours is not None) == flag
        if flag:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@both_ops
@pytest.mark.parametrize("subset", [s for s in itertools.product([False, True], repeat=3) if any(s)], ids=str)
def test_kernels_are_asked_for_the_gradients_needed_and_no_more(
    op: str, subset: tuple[bool, ...], reference_calls
) -> None:
    if op == "rms_norm" and subset[2]:
        pytest.skip("rms_norm has no bias")
    tensors = [
        t.requires_grad_(flag)
        for t, flag in zip((torch.randn(5, 24), torch.randn(24), torch.randn(24)), subset, strict=True)
    ]
    with fused_norm.use_backend("reference"):
        call(op, FF, tensors[0], (24,), *tensors[1:]).backward(torch.randn(5, 24))
    (backward,) = reference_calls.backward
    assert (backward.need_dx, backward.need_dw, backward.need_db) == subset
    assert reference_calls.forward[0].need_stats


@both_ops
@pytest.mark.parametrize("which", ["nothing requires grad", "no_grad", "inference_mode", "detached"])
def test_no_statistics_where_no_gradient_is_wanted(op: str, which: str, reference_calls) -> None:
    x, w = torch.randn(5, 24), torch.randn(24)
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    if which in modes:
        x.requires_grad_()
        with modes[which](), fused_norm.use_backend("reference"):
            y = call(op, FF, x, (24,), w)
    else:
        with fused_norm.use_backend("reference"):
            y = call(op, FF, x.requires_grad_().detach() if which == "detached" else x, (24,), w)
    assert not y.requires_grad and y.is_inference() == (which == "inference_mode")
    assert [c.need_stats for c in reference_calls.forward] == [False]
    torch.testing.assert_close(y, call(op, F, x.detach(), (24,), w))


@both_ops
def test_no_grad_gives_the_bits_of_grad(op: str, place) -> None:
    case = NormCase(op, 9, 300, torch.float32)
    inputs = draw(case, place.device)
    with torch.no_grad():
        quiet = call(op, FF, inputs.x, (300,), inputs.weight, inputs.bias)
    with torch.inference_mode():
        inference = call(op, FF, inputs.x, (300,), inputs.weight, inputs.bias)
    assert_same_bits(quiet, run(case, inputs).y)
    assert_same_bits(inference.clone(), quiet.clone())


def test_inference_tensor_cannot_be_saved(place) -> None:
    with torch.inference_mode():
        x = torch.randn(3, 8, device=place.device)
    w = torch.ones(8, device=place.device, requires_grad=True)
    for namespace in (F, FF):
        with pytest.raises(RuntimeError, match=r"(?i)inference"):
            namespace.layer_norm(x, (8,), w)


@both_ops
def test_mixed_parameter_dtypes_give_gradients_in_their_own_dtype(op: str, place) -> None:
    for dtype in LOW_PRECISION:
        case = NormCase(op, 6, 40, dtype, param_dtype=torch.float32)
        result = run(case, draw(case, place.device))
        assert result.y.dtype == result.dx.dtype == dtype
        assert result.dw.dtype == torch.float32 and (op == "rms_norm" or result.db.dtype == torch.float32)


@pytest.mark.parametrize(
    "x_dtype, w_dtype",
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float64),
    ],
    ids=str,
)
def test_rms_norm_takes_any_floating_weight(x_dtype: torch.dtype, w_dtype: torch.dtype, place) -> None:
    """layer_norm refuses these (test_opinfo.py); torch's rms_norm promotes."""
    x, w = torch.randn(5, 24).to(place.device, x_dtype), torch.randn(24).to(place.device, w_dtype)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for namespace in (FF, F):
            leaves = leaf(x), leaf(w)
            y = namespace.rms_norm(leaves[0], (24,), leaves[1])
            results.append((y, *torch.autograd.grad(y.double().sin().sum(), leaves)))
    for a, e in zip(*results, strict=True):
        tolerance = (
            {"rtol": 2e-2, "atol": 2e-2} if torch.bfloat16 in (x_dtype, w_dtype) else {"rtol": 2e-3, "atol": 2e-3}
        )
        torch.testing.assert_close(a, e, **tolerance)


@both_ops
def test_backward_runs_on_the_backend_of_forward(op: str, reference_calls) -> None:
    x = torch.randn(5, 24, requires_grad=True)
    with fused_norm.use_backend("reference"):
        y = call(op, FF, x, (24,))
    with fused_norm.use_backend("torch"):
        z = call(op, FF, x, (24,))
    y.backward(torch.randn_like(y))
    assert len(reference_calls.backward) == 1
    with fused_norm.use_backend("reference"):
        z.backward(torch.randn_like(z))
    assert len(reference_calls.forward) == len(reference_calls.backward) == 1


@both_ops
def test_backward_twice_needs_the_graph_kept(op: str, place) -> None:
    x = torch.randn(5, 24, device=place.device, requires_grad=True)
    dy = torch.randn_like(x)
    y = call(op, FF, x, (24,))
    first = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    second = torch.autograd.grad(y, x, dy)[0]
    assert_same_bits(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, x, dy)


@both_ops
def test_gradients_accumulate_over_uses(op: str, place) -> None:
    """The same weight in two places, and x into itself."""
    results = []
    start = torch.randn(5, 24, dtype=torch.float64, device=place.device)
    weight = torch.randn(24, dtype=torch.float64, device=place.device)
    for namespace in (FF, F):
        x, w = leaf(start), leaf(weight)
        call(op, namespace, x + call(op, namespace, x, (24,), w), (24,), w).square().sin().sum().backward()
        results.append((x.grad, w.grad))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@both_ops
@pytest.mark.parametrize("saved", ["x", "weight"])
def test_mutating_a_saved_input_raises(op: str, saved: str, place) -> None:
    for namespace in (F, FF):
        x, w = (torch.randn(*s, device=place.device, requires_grad=True) for s in ((5, 24), (24,)))
        y = call(op, namespace, x, (24,), w)
        with torch.no_grad():
            {"x": x, "weight": w}[saved].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(torch.ones_like(y))


@both_ops
def test_mutating_the_output_is_fine(op: str, place) -> None:
    start, dy = torch.randn(2, 5, 24, device=place.device), torch.randn(2, 5, 24, device=place.device)
    grads = []
    for namespace in (FF, F):
        x = leaf(start)
        y = call(op, namespace, x, (24,))
        y.mul_(3).add_(1)
        y[..., 0].zero_()
        y.backward(dy)
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@both_ops
def test_gradcheck_first_order(op: str, place) -> None:
    leaves = [
        torch.randn(*s, dtype=torch.float64, device=place.device, requires_grad=True) for s in ((2, 3, 7), (7,), (7,))
    ]
    leaves = leaves if op == "layer_norm" else leaves[:2]
    assert torch.autograd.gradcheck(lambda *t: call(op, FF, t[0], (7,), *t[1:]), leaves)


# ------------------------------------------------------------------------------------------------- NaN, Inf and zero


@both_ops
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@all_dtypes
def test_a_bad_value_stays_in_its_row(op: str, value: float, dtype: torch.dtype, place) -> None:
    x = torch.randn(5, 40).to(place.device, dtype)
    clean = call(op, FF, x, (40,))
    x[2, 7] = value
    y = call(op, FF, x, (40,))
    theirs = call(op, F, x, (40,))
    assert torch.equal(y.isnan(), theirs.isnan())
    others = [0, 1, 3, 4]
    assert_same_bits(y[others], clean[others])
    if op == "layer_norm" or value != value:
        assert y[2].isnan().all()
    else:
        assert y[2, 7].isnan() and (y[2].nan_to_num(0.0) == 0).all()


@both_ops
def test_gradients_of_a_bad_row_stay_in_it(op: str, place) -> None:
    x = torch.randn(5, 40, device=place.device)
    x[2, 7] = float("inf")
    dy = torch.randn_like(x)
    grads = []
    for namespace in (FF, F):
        leaf_x = leaf(x)
        grads.append(torch.autograd.grad(call(op, namespace, leaf_x, (40,)), leaf_x, dy)[0])
    others = [0, 1, 3, 4]
    torch.testing.assert_close(grads[0][others], grads[1][others], rtol=1e-5, atol=1e-5)
    assert grads[0][2].isnan().any() == grads[1][2].isnan().any()


@all_dtypes
def test_constant_rows(dtype: torch.dtype, place) -> None:
    """Exactly the bias with eps > 0, whatever the constant; NaN with eps = 0."""
    for constant in (0.0, 1.0, 0.1, -3.7, 1000.1):
        x = torch.full((3, 77), constant, dtype=dtype, device=place.device)
        b = torch.randn(77).to(x)
        y = FF.layer_norm(x, (77,), None, b)
        if place.backend == "torch":
            torch.testing.assert_close(y, b.expand(3, 77), rtol=0, atol=0.1)
        else:
            assert_same_bits(y, b.expand(3, 77).contiguous(), str(constant))
    assert FF.layer_norm(torch.ones(3, 77, dtype=dtype, device=place.device), (77,), eps=0.0).isnan().all()
    assert FF.rms_norm(torch.zeros(3, 77, dtype=dtype, device=place.device), (77,), eps=0.0).isnan().all()
    assert (FF.rms_norm(torch.zeros(3, 77, dtype=dtype, device=place.device), (77,)) == 0).all()


# ------------------------------------------------------------------------------------------------------- determinism


@both_ops
@pytest.mark.parametrize("n", [1, 7, 64, 768, 1000, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_is_batch_invariant(op: str, n: int, dtype: torch.dtype, place) -> None:
    """A row's output does not depend on how many rows stand beside it, nor on where it stands."""
    if place.backend == "torch":
        pytest.skip("torch's own kernels promise nothing")
    x = torch.randn(67, n).to(place.device, dtype)
    w = torch.randn(n).to(x)
    whole = call(op, FF, x, (n,), w)
    for rows in (1, 2, 3, 4, 5, 8, 16, 31, 66):
        assert_same_bits(call(op, FF, x[:rows], (n,), w), whole[:rows], f"the first {rows}")
        assert_same_bits(call(op, FF, x[-rows:], (n,), w), whole[-rows:], f"the last {rows}")


@both_ops
@pytest.mark.parametrize("rows, n", [(1, 20000), (300, 768), (2000, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_repeat_bit_for_bit(op: str, rows: int, n: int, dtype: torch.dtype, place) -> None:
    case = NormCase(op, rows, n, dtype)
    inputs = draw(case, place.device)
    first, second = run(case, inputs), run(case, inputs)
    for name in ("y", "dx", "dw", "db"):
        assert_same_bits(getattr(first, name), getattr(second, name), name)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@both_ops
@pytest.mark.parametrize("rows, n", [(1, 70000), (300, 768), (4000, 33), (3, 4097)])
def test_bits_do_not_depend_on_the_number_of_threads(op: str, rows: int, n: int, threads) -> None:
    with fused_norm.use_backend("auto"):
        if fused_norm.available_backends()["native"] is not None:
            pytest.skip("native is missing, and torch's own kernels promise nothing")
        case = NormCase(op, rows, n, torch.float32)
        inputs = draw(case)
        results = []
        for count in (1, 2, 3, 5):
            threads(count)
            results.append(run(case, inputs))
    for other in results[1:]:
        for name in ("y", "dx", "dw", "db"):
            assert_same_bits(getattr(results[0], name), getattr(other, name), name)


# --------------------------------------------------------------------------------- subclasses, modes, nested, devices


class Logging(torch.Tensor):
    """Records the functions that reach ``__torch_function__``."""

    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@both_ops
@pytest.mark.parametrize("which", [0, 1, 2], ids=["input", "weight", "bias"])
def test_torch_function_subclass_is_handed_to_torchs_function(op: str, which: int, place) -> None:
    if op == "rms_norm" and which == 2:
        pytest.skip("rms_norm has no bias")
    tensors = [torch.randn(5, 24, device=place.device), *(torch.randn(24, device=place.device) for _ in range(2))]
    expected = call(op, F, tensors[0], (24,), *tensors[1:])
    tensors[which] = tensors[which].as_subclass(Logging)
    seen = []
    for namespace in (F, FF):
        Logging.seen = []
        y = call(op, namespace, tensors[0], (24,), *tensors[1:])
        assert type(y) is Logging
        torch.testing.assert_close(y.as_subclass(torch.Tensor), expected)
        seen.append([getattr(f, "__name__", "") for f in Logging.seen if getattr(f, "__name__", "") == op])
    assert seen[1] and set(seen[1]) == set(seen[0])


def test_a_subclass_without_torch_function_of_its_own_keeps_its_type(place) -> None:
    class Named(torch.Tensor):
        pass

    x = torch.randn(5, 24, device=place.device).as_subclass(Named)
    assert type(FF.layer_norm(x, (24,))) is type(F.layer_norm(x, (24,))) is Named


def test_parameters_are_served_by_kernels(reference_calls) -> None:
    """``nn.Parameter`` is a subclass too, and the most common one."""
    w = torch.nn.Parameter(torch.randn(24))
    with fused_norm.use_backend("reference"):
        FF.rms_norm(torch.nn.Parameter(torch.randn(5, 24)), (24,), w).backward(torch.randn(5, 24))
    assert len(reference_calls.forward) == len(reference_calls.backward) == 1 and w.grad is not None


@both_ops
@pytest.mark.parametrize("which", ["input", "weight", "all"])
def test_dispatch_subclass_is_handed_to_torchs_function(op: str, which: str, place, reference_calls) -> None:
    """A wrapper such as DTensor has no memory of its own: a kernel would read nothing good at its data pointer."""
    x, w = torch.randn(5, 24, device=place.device), torch.randn(24, device=place.device)
    if which == "all" or which == "input":
        x = TwoTensor(x, x.clone() + 1)
    if which == "all" or which == "weight":
        w = TwoTensor(w, w.clone() * 2)
    results = []
    for namespace in (F, FF):
        leaves = [t.clone().detach().requires_grad_() for t in (x, w)]
        y = call(op, namespace, leaves[0], (24,), leaves[1])
        assert isinstance(y, TwoTensor)
        results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y) * 0.5)))
    for theirs, ours in zip(*results, strict=True):
        assert type(theirs) is type(ours)
        pairs = ((theirs.a, ours.a), (theirs.b, ours.b)) if isinstance(theirs, TwoTensor) else ((theirs, ours),)
        for t, o in pairs:
            torch.testing.assert_close(o, t)
    assert not any(isinstance(t, TwoTensor) for c in reference_calls.forward for t in (c.x, c.weight))


@both_ops
def test_device_context_and_other_function_modes_keep_the_kernels(op: str, reference_calls) -> None:
    x, w = torch.randn(5, 24, requires_grad=True), torch.randn(24)
    expected = call(op, F, x, (24,), w)

    seen = []

    class Recording(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for number, mode in enumerate((torch.device("cpu"), torch.device("meta"), Recording()), 1):
        with mode, fused_norm.use_backend("reference"):
            y = call(op, FF, x, (24,), w)
            y.backward(torch.randn(5, 24, device="cpu"))
        torch.testing.assert_close(y, expected)
        assert len(reference_calls.forward) == len(reference_calls.backward) == number
    assert getattr(FF, op) in seen, "a mode sees the call itself, as it sees torch's"


@both_ops
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensor_as_torch(op: str, layout: torch.layout, place) -> None:
    parts = [torch.randn(k, 6, device=place.device) for k in (2, 4, 3)]
    w, b = torch.randn(6, device=place.device), torch.randn(6, device=place.device)

    def result(namespace):
        leaves = [leaf(p) for p in parts]
        nested = torch.nested.as_nested_tensor(leaves, layout=layout)
        y = call(op, namespace, nested, (6,), w, b)
        values = torch.cat(list(y.unbind()))
        return (values, *torch.autograd.grad(values.sin().sum(), leaves))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = result(F)
        except Exception as error:
            with pytest.raises(type(error)):
                result(FF)
            return
        ours = result(FF)
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@both_ops
@all_dtypes
def test_meta_device(op: str, dtype: torch.dtype) -> None:
    x = torch.empty(5, 6, 24, dtype=dtype, device="meta", requires_grad=True)
    w = torch.empty(24, dtype=dtype, device="meta", requires_grad=True)
    y = call(op, FF, x.transpose(0, 1), (24,), w)
    assert (y.shape, y.dtype, y.device.type) == ((6, 5, 24), dtype, "meta")
    dx, dw = torch.autograd.grad(y, (x, w), torch.empty_like(y))
    assert (dx.shape, dx.dtype, dx.device.type) == (x.shape, dtype, "meta")
    assert (dw.shape, dw.dtype, dw.device.type) == (w.shape, dtype, "meta")


# ------------------------------------------------------------------------------------------------------------ autocast


@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cpu_autocast_leaves_the_dtype_alone(op: str, dtype: torch.dtype) -> None:
    x, w = torch.randn(5, 24).to(dtype).requires_grad_(), torch.randn(24, requires_grad=True)
    plain = call(op, FF, x, (24,), w)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = call(op, FF, x, (24,), w), call(op, F, x, (24,), w)
    assert ours.dtype == theirs.dtype == dtype
    assert_same_bits(ours, plain)
    dx, dw = torch.autograd.grad(ours, (x, w), torch.randn(5, 24).to(dtype))
    assert dx.dtype == dtype and dw.dtype == torch.float32


@pytest.mark.gpu
@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_cuda_autocast_runs_in_fp32(op: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 24, device="cuda").to(dtype).requires_grad_()
    w = torch.randn(24, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.float16):
        y, theirs = call(op, FF, x, (24,), w), call(op, F, x, (24,), w)
    assert y.dtype == theirs.dtype
    assert dtype == torch.float64 or y.dtype == torch.float32
    torch.testing.assert_close(y, theirs, rtol=1e-5, atol=1e-5)
    dx, dw = torch.autograd.grad(y, (x, w), torch.randn_like(y))
    assert dx.dtype == dtype and dw.dtype == torch.float32


def test_functions_pickle_and_have_documentation() -> None:
    import pickle

    for op in OPS:
        function = getattr(FF, op)
        assert pickle.loads(pickle.dumps(function)) is function
        assert function.__doc__ and has_bias(op, "bias") == (
            "bias" in function.__code__.co_varnames[: function.__code__.co_argcount]
        )


@pytest.mark.parametrize("freed", ["x", "weight", "bias", "x before backward"])
def test_a_freed_storage_raises(freed: str, place) -> None:
    """FSDP frees parameters between uses. Reading them must raise, not fault, and not count as having none."""
    if place.backend in ("torch", "reference"):
        pytest.skip("torch's own operations: some raise, some fault")
    x = torch.randn(6, 8, device=place.device, requires_grad=True)
    weight, bias = torch.full((8,), 3.0, device=place.device), torch.ones(8, device=place.device)
    if freed == "x before backward":
        y = FF.layer_norm(x, (8,), weight, bias)
        x.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(y, x, torch.randn(6, 8, device=place.device))
    else:
        {"x": x, "weight": weight, "bias": bias}[freed].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError):
            FF.layer_norm(x, (8,), weight, bias)
