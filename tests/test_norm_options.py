"""weight_offset, cast_before_weight and memory_efficient: what other models' norms compute, and what backward keeps."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LOW_PRECISION, OPS, assert_same_bits, leaf
from torch import Tensor, nn

import fused_norm
import fused_norm.functional as FF
from fused_norm.testing import norm_truth, one_rounding, relative_error, typical_rounding

both_ops = pytest.mark.parametrize("op", OPS)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def _call(op: str, x: Tensor, params: list[Tensor], **options) -> Tensor:
    return getattr(FF, op)(x, params[0].shape, *params, eps=1e-5, **options)


def _inputs(op: str, rows: int, n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, list[Tensor]]:
    x = (torch.randn(rows, n) + 0.5).to(device, dtype)
    params = [(torch.randn(n) * 0.3 + 1).to(device, dtype), (torch.randn(n) * 0.3).to(device, dtype)]
    return x, params if op == "layer_norm" else params[:1]


def _results(function, x: Tensor, params: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [leaf(t) for t in (x, *params)]
    y = function(leaves[0], leaves[1:])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def _assert_as_good(ours: list[Tensor], theirs: list[Tensor], truth: list[Tensor]) -> None:
    """Errors against fp64 within the rule, ``theirs`` in torch's place; a sum over rows has a few roundings."""
    for i, (a, t, exact) in enumerate(zip(ours, theirs, truth, strict=True)):
        low = a.dtype in LOW_PRECISION
        rounding = max(one_rounding(exact, a.dtype), typical_rounding(a.dtype))
        floor = (3 if i > 1 else 1.05) if low else 8
        assert a.dtype == t.dtype and a.shape == t.shape, i
        assert relative_error(a, exact) <= max((1.05 if low else 1.5) * relative_error(t, exact), floor * rounding), i


# ------------------------------------------------------------------------------------ against transformers' own classes


@all_dtypes
@pytest.mark.parametrize("n", [7, 64, 1000])
def test_llamas_rms_norm_to_the_bit(n: int, dtype: torch.dtype, place) -> None:
    """Normalise in fp32, round, multiply in the model's dtype. (Of fp64 input Llama loses half the digits.)"""
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    theirs = modeling.LlamaRMSNorm(n, eps=1e-5).to(place.device, dtype)
    x, params = _inputs("rms_norm", 33, n, dtype, place.device)
    with torch.no_grad():
        theirs.weight.copy_(params[0])
    ours = FF.rms_norm(x, (n,), theirs.weight, 1e-5, cast_before_weight=True)
    expected = theirs(x)
    if dtype == torch.float64:
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    elif dtype == torch.float32:
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    else:
        # The fp32 row may differ in its last digit, and so, rarely, the rounding of it.
        same = (ours == expected).double().mean()
        assert same > 0.995
        torch.testing.assert_close(ours, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
        without = FF.rms_norm(x, (n,), theirs.weight, 1e-5)
        assert (without == expected).double().mean() < 0.95  # the order matters, or this test shows nothing


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_gradients_of_the_llama_order(dtype: torch.dtype, place) -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, params = _inputs("rms_norm", 40, 128, dtype, place.device)
    dy = torch.randn_like(x)
    theirs = modeling.LlamaRMSNorm(128, eps=1e-5).to(place.device, dtype)

    def stock(x, params):
        return torch.func.functional_call(theirs, {"weight": params[0]}, (x,))

    ours = _results(lambda x, ps: _call("rms_norm", x, ps, cast_before_weight=True), x, params, dy)
    truth = norm_truth(x, *params, None, dy, 128, 1e-5, True)
    exact = [truth.y, truth.dx, truth.dw.view(-1)]
    results = _results(stock, x, params, dy)
    if place.backend == "torch":
        ours, results, exact = ours[:1], results[:1], exact[:1]  # plain operations: theirs, in torch's order
    _assert_as_good(ours, results, exact)


@all_dtypes
def test_gemmas_rms_norm(dtype: torch.dtype, place) -> None:
    """(1 + w) in fp32, rounded at the end."""
    modeling = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    theirs = modeling.GemmaRMSNorm(96, eps=1e-5).to(place.device, dtype)
    x, params = _inputs("rms_norm", 33, 96, dtype, place.device)
    params = [params[0] - 1]
    dy = torch.randn_like(x)
    truth = norm_truth(x, params[0].double() + 1, None, dy, 96, 1e-5, True)
    if dtype == torch.float64:  # Gemma computes in fp32
        ours = _results(lambda x, ps: _call("rms_norm", x, ps, weight_offset=1.0), x, params, dy)
        for a, e in zip(ours, [truth.y, truth.dx, truth.dw.view(-1)], strict=True):
            torch.testing.assert_close(a, e)
        return

    def stock(x, params):
        return torch.func.functional_call(theirs, {"weight": params[0]}, (x,))

    _assert_as_good(
        _results(lambda x, ps: _call("rms_norm", x, ps, weight_offset=1.0), x, params, dy),
        _results(stock, x, params, dy),
        [truth.y, truth.dx, truth.dw.view(-1)],
    )


@all_dtypes
def test_nemotrons_layer_norm(dtype: torch.dtype, place) -> None:
    """torch's layer norm of weight + 1; ours does not round that sum to bf16."""
    modeling = pytest.importorskip("transformers.models.nemotron.modeling_nemotron")
    theirs = modeling.NemotronLayerNorm1P(96, eps=1e-5).to(place.device, dtype)
    x, params = _inputs("layer_norm", 33, 96, dtype, place.device)
    params[0] = params[0] - 1
    dy = torch.randn_like(x)

    def stock(x, params):
        return torch.func.functional_call(theirs, {"weight": params[0], "bias": params[1]}, (x,))

    truth = norm_truth(x, params[0].double() + 1, params[1], dy, 96, 1e-5, False)
    ours = _results(lambda x, ps: _call("layer_norm", x, ps, weight_offset=1.0), x, params, dy)
    exact = [truth.y, truth.dx, truth.dw.view(-1), truth.db.view(-1)]
    judged = 2 if place.backend == "torch" else 4  # torch's sums over rows are its own affair
    _assert_as_good(ours[:judged], _results(stock, x, params, dy)[:judged], exact[:judged])


@both_ops
def test_weight_offset_is_the_shifted_weight(op: str, place) -> None:
    """With every derivative, any offset, fp32 parameters beside bf16, and under the transforms."""
    x, params = _inputs(op, 9, 24, torch.float64, place.device)
    dy = torch.randn_like(x)
    for offset in (1.0, -0.37, 2):
        ours = _results(lambda x, ps: _call(op, x, ps, weight_offset=offset), x, params, dy)  # noqa: B023
        shifted = _results(lambda x, ps: _call(op, x, [ps[0] + offset, *ps[1:]]), x, params, dy)  # noqa: B023
        for a, e in zip(ours, shifted, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    low = _call(op, x.bfloat16(), [p.float() for p in params], weight_offset=1.0)
    assert low.dtype == torch.bfloat16
    jvp = torch.func.jvp(lambda w: _call(op, x, [w, *params[1:]], weight_offset=1.0), (params[0],), (params[0],))[1]
    expected = torch.func.jvp(lambda w: _call(op, x, [w + 1.0, *params[1:]]), (params[0],), (params[0],))[1]
    torch.testing.assert_close(jvp, expected)


@both_ops
def test_weight_offset_refuses_what_the_norm_refuses(op: str, place) -> None:
    x, params = _inputs(op, 3, 8, torch.float32, place.device)
    with pytest.raises(ValueError, match=r"weight_offset is 1\.0, weight is None"):
        getattr(FF, op)(x, (8,), weight_offset=1.0)
    with pytest.raises(RuntimeError, match=r"\(6,\).*\(8,\)"):
        getattr(FF, op)(x, (8,), params[0][:6], weight_offset=1.0)
    if op == "layer_norm" and place.backend != "torch":
        with pytest.raises(RuntimeError, match=r"bfloat16.*float32"):
            FF.layer_norm(x, (8,), params[0].bfloat16(), weight_offset=1.0)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_cast_under_torch_compile_export_and_transforms(dtype: torch.dtype, place) -> None:
    x, params = _inputs("rms_norm", 9, 64, dtype, place.device)

    def function(x, w):
        return FF.rms_norm(x, (64,), w, 1e-5, cast_before_weight=True)

    expected = function(x, *params)
    assert not torch.equal(expected, FF.rms_norm(x, (64,), *params, 1e-5))
    torch._dynamo.reset()
    if place.backend != "torch":
        # Inductor leaves out a rounding between two operations that it fuses: the reference's formulas, that is.
        compiler = "aot_eager" if place.backend == "reference" else "inductor"
        assert_same_bits(torch.compile(function, fullgraph=True, backend=compiler)(x, *params), expected)
        assert_same_bits(torch.func.vmap(function, (0, None))(x[:, None], *params)[:, 0], expected)
        assert_same_bits(torch.func.jvp(lambda x: function(x, *params), (x,), (x,))[0], expected)

    class Module(nn.Module):
        def forward(self, x, w):
            return function(x, w)

    program = torch.export.export(Module(), (x, *params))
    assert "fused_norm" not in str(program.graph)
    torch.testing.assert_close(program.module()(x, *params), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


# ----------------------------------------------------------------------------------------------------- memory_efficient


def _with_bad_columns(op: str, params: list[Tensor]) -> list[Tensor]:
    """A weight that is 0, one that is denormal, one far below its bias, one far below the rest."""
    params = [p.clone() for p in params]
    params[0][3] = 0
    params[0][5] = torch.finfo(params[0].dtype).tiny / 4
    params[0][7] = -1e-3
    if op == "layer_norm":
        params[1][8] = 50.0
    return params


@both_ops
@all_dtypes
@pytest.mark.parametrize("bad", [False, True], ids=["", "bad columns"])
@pytest.mark.parametrize("rows, n", [(40, 63), (64, 768)])
def test_memory_efficient_gradients(op: str, rows: int, n: int, bad: bool, dtype: torch.dtype, place) -> None:
    """Against fp64, beside those of the norm that keeps its input: in bf16 and fp16 xhat has the output's rounding."""
    x, params = _inputs(op, rows, n, dtype, place.device)
    params = _with_bad_columns(op, params) if bad else params
    dy = torch.randn_like(x)
    kept_y = _results(lambda x, ps: _call(op, x, ps, memory_efficient=True), x, params, dy)
    kept_x = _results(lambda x, ps: _call(op, x, ps), x, params, dy)
    truth = norm_truth(x, *params, *[None] * (2 - len(params)), dy, n, 1e-5, op == "rms_norm")
    assert_same_bits(kept_y[0], kept_x[0])
    for name, a, b in zip(("dx", "dw", "db"), kept_y[1:], kept_x[1:], strict=False):
        exact = getattr(truth, name)
        exact = exact.view(a.shape)
        rounding = max(one_rounding(exact, dtype), typical_rounding(dtype))
        floor = (3 if name == "dw" else 1.5) if dtype in LOW_PRECISION else 16
        assert relative_error(a, exact) <= max(1.5 * relative_error(b, exact), floor * rounding), name
        if bad and name == "dw":  # column by column: a wrong one would drown in the norm of all
            for column in (3, 5, 7, 8):
                error = (a[column].double() - exact[column]).abs()
                scale = (dy[:, column].double().square().sum() * 4).sqrt()
                assert error <= 8 * torch.finfo(dtype).eps * scale, column


@both_ops
@pytest.mark.parametrize("bad", [False, True], ids=["", "bad columns"])
def test_memory_efficient_second_derivatives(op: str, bad: bool, place) -> None:
    """What backward recovers is a function of outputs, which has the input's derivatives."""
    x, params = _inputs(op, 5, 24, torch.float64, place.device)
    params = _with_bad_columns(op, params) if bad else params
    dy = torch.randn_like(x)
    results = []
    for efficient in (True, False):
        leaves = [leaf(t) for t in (x, *params, dy)]
        y = _call(op, leaves[0], leaves[1:-1], memory_efficient=efficient)
        first = torch.autograd.grad(y, leaves[:-1], leaves[-1], create_graph=True)
        weights = [torch.linspace(-1, 2, g.numel(), dtype=g.dtype, device=g.device).view_as(g) for g in first]
        total = sum((g * w).sum() for g, w in zip(first, weights, strict=True))
        second = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
        total = sum((g * g.detach().sin()).sum() for g in second)
        results.append([*first, *second, *torch.autograd.grad(total, leaves, materialize_grads=True)])
    for i, (a, e) in enumerate(zip(*results, strict=True)):
        assert (a - e).norm() < 1e-7 * (1 + e.norm()), i


@both_ops
def test_memory_efficient_gradcheck(op: str, place) -> None:
    x, params = _inputs(op, 3, 6, torch.float64, place.device)
    params[0][2] = 0
    leaves = [leaf(t) for t in (x, *params)]
    function = lambda x, *ps: _call(op, x, list(ps), memory_efficient=True)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


@both_ops
def test_what_memory_efficient_keeps(op: str, place) -> None:
    """The output, one number a row, the parameters and the columns apart: not the input."""
    x, params = _inputs(op, 64, 512, torch.float32, place.device)
    x = leaf(x)

    def saved(params, efficient):
        found = []

        def pack(t: Tensor) -> Tensor:
            found.append((t.data_ptr(), t.numel()))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = _call(op, x, params, memory_efficient=efficient)
        return y, found

    if op == "layer_norm":  # about a third of its columns have a bias larger than the weight, or it would show nothing
        params = [params[0] + 1, params[1]]
    y, found = saved(params, True)
    if place.backend == "torch":
        return
    assert x.data_ptr() not in dict(found) and y.data_ptr() in dict(found)
    assert sum(size for _, size in found) <= x.numel() + 64 + 3 * 512
    bad = _with_bad_columns(op, params)
    y, found = saved(bad, True)
    assert x.data_ptr() not in dict(found)
    assert sum(size for _, size in found) <= x.numel() + 64 * (1 + 4) + 3 * 512
    zeros = [torch.zeros_like(params[0]), *params[1:]]
    _, found = saved(zeros, True)
    assert x.data_ptr() in dict(found)  # every column would be apart: the input it is


@both_ops
def test_memory_saved_in_a_stack_of_blocks(op: str, place) -> None:
    """norm, then a linear layer that keeps the norm's output anyway: half the activations go."""
    if place.backend == "torch":
        pytest.skip("torch's own keeps its input")
    cls = fused_norm.LayerNorm if op == "layer_norm" else fused_norm.RMSNorm
    kept = {}
    for efficient in (False, True):
        blocks = nn.Sequential(
            *(nn.Sequential(cls(64, memory_efficient=efficient), nn.Linear(64, 64, bias=False)) for _ in range(4))
        ).to(place.device)
        x = torch.randn(256, 64, device=place.device, requires_grad=True)
        storages: dict[int, int] = {}

        def pack(t: Tensor, storages=storages) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = blocks(x)
        parameters = sum(storages.get(p.untyped_storage().data_ptr(), 0) for p in blocks.parameters())
        kept[efficient] = sum(storages.values()) - parameters
        del y
        gc.collect()
    activation = 256 * 64 * 4
    assert kept[False] >= 8 * activation  # each norm's input and each linear layer's
    assert kept[True] <= 4 * activation + 4 * 3 * 256 * 4  # the shared outputs, and the statistics


@both_ops
def test_writing_over_a_kept_output_raises(op: str, place) -> None:
    if place.backend == "torch":
        pytest.skip("torch's own keeps its input")
    x, params = _inputs(op, 4, 16, torch.float32, place.device)
    params = [params[0] + 1, *params[1:]]
    x = leaf(x)
    y = _call(op, x, params, memory_efficient=True)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)
    y = _call(op, x, params, memory_efficient=True)
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(_call(op, x, params), x, dy)
    with torch.no_grad():
        x.zero_()  # the input is nobody's business any more
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], expected, rtol=1e-4, atol=1e-5)


@both_ops
def test_memory_efficient_under_transforms_and_compile_changes_nothing(op: str, place) -> None:
    x, params = _inputs(op, 4, 16, torch.float64, place.device)
    dy = torch.randn_like(x)

    def gradient(efficient):
        loss = lambda x: (_call(op, x, params, memory_efficient=efficient) * dy).sum()  # noqa: E731
        return torch.func.vmap(torch.func.grad(loss))(x[:, None].expand(-1, 4, -1))

    torch.testing.assert_close(gradient(True), gradient(False))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: _call(op, x, params, memory_efficient=True), fullgraph=True, backend="aot_eager")
    a, b = leaf(x), leaf(x)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(a), a, dy)[0], torch.autograd.grad(_call(op, b, params), b, dy)[0]
    )


@both_ops
def test_memory_efficient_without_parameters(op: str, place) -> None:
    x, _ = _inputs(op, 6, 40, torch.float64, place.device)
    dy = torch.randn_like(x)
    results = []
    for efficient in (True, False):
        a = leaf(x)
        y = getattr(FF, op)(a, (40,), eps=1e-5, memory_efficient=efficient)
        results.append(torch.autograd.grad(y, a, dy)[0])
    torch.testing.assert_close(*results)
    if op == "layer_norm":
        b = leaf(torch.full((40,), 0.5, dtype=torch.float64, device=place.device))
        a = leaf(x)
        y = FF.layer_norm(a, (40,), None, b, memory_efficient=True)
        expected = F.layer_norm(a, (40,), None, b)
        for ours, theirs in zip(
            torch.autograd.grad(y, (a, b), dy), torch.autograd.grad(expected, (a, b), dy), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
