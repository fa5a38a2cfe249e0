"""torch.compile, torch.export, operators and their fakes: no graph break, and no change of result."""

from __future__ import annotations

import io
import itertools
import threading

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from cases import DTYPES, LOW_PRECISION, OPS, assert_same_bits, call, exception_of, leaf
from test_autograd import HIGHER, TRANSFORMS, _close, _function, _three, composite
from torch import Tensor

import fused_norm
import fused_norm.functional as FF

both_ops = pytest.mark.parametrize("op", OPS)
MODULES = {"layer_norm": fused_norm.LayerNorm, "rms_norm": fused_norm.RMSNorm}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _forward_and_backward(function, inputs: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    leaves = [leaf(t) for t in inputs]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def _targets(function, *inputs: Tensor) -> list[str]:
    """The operators of the graphs, forward and backward, that AOTAutograd hands to a compiler."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    found = []

    def compiler(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph)

    y = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))(*inputs)
    if y.requires_grad:
        y.sum().backward()
    return found


# ------------------------------------------------------------------------------------------------------------ compile


@both_ops
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_fullgraph_gives_the_bits_of_eager(op: str, compiler: str, dynamic: bool | None, place) -> None:
    """Forward and backward, at several shapes, for the second of which at the latest the compiled code is general."""
    if place.backend == "torch" and compiler == "aot_eager":
        pytest.skip("AOTAutograd decomposes torch's own")
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    params = 2 if op == "layer_norm" else 1

    def function(x, *params):
        return call(op, FF, x.sin(), (24,), *params) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    for rows in (5, 9, 12, 14):
        inputs = [torch.randn(*s, device=place.device) for s in ((rows, 24), *[(24,)] * params)]
        dy = torch.randn(rows, 24, device=place.device)
        expected = _forward_and_backward(function, inputs, dy)
        for a, e in zip(_forward_and_backward(compiled, inputs, dy), expected, strict=True):
            assert_same_bits(a, e)
        if rows == 9:
            compilations = counter.frame_count
    assert counter.frame_count == compilations


@both_ops
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_inductor_gives_the_bits_of_the_kernels(op: str, dtype: torch.dtype, place) -> None:
    if place.backend not in ("native", "triton"):
        pytest.skip("Inductor fuses eager operations, in its own order of sums")
    for param_dtype in {dtype, torch.float32 if dtype in LOW_PRECISION else dtype}:
        torch._dynamo.reset()
        inputs = [torch.randn(5, 48).to(place.device, dtype), torch.randn(48).to(place.device, param_dtype)]
        dy = torch.randn(5, 48).to(place.device, dtype)

        def function(x, w):
            return call(op, FF, x, (48,), w)

        results = (_forward_and_backward(f, inputs, dy) for f in (torch.compile(function, fullgraph=True), function))
        for a, e in zip(*results, strict=True):
            assert_same_bits(a, e)


def test_a_model_with_inductor(place) -> None:
    modules = [torch.nn.Linear(16, 24), fused_norm.LayerNorm(24), torch.nn.GELU(), fused_norm.RMSNorm(24)]
    model = torch.nn.Sequential(*modules).to(place.device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    x = torch.randn(5, 16, device=place.device)
    results = []
    for function in (compiled, model):
        model.zero_grad()
        y = function(x)
        (y * torch.linspace(-1, 1, 24, device=place.device)).square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@both_ops
@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "rows apart", "several dimensions", "empty"])
def test_layouts(op: str, layout: str, place) -> None:
    base = torch.randn(6, 4, 24, device=place.device)
    x, shape = {
        "transposed": (base.transpose(0, 1), (24,)),
        "expanded": (base[:1].expand(6, 4, 24), (24,)),
        "sliced": (base[..., ::2], (12,)),
        "rows apart": (base[:, 1, :], (24,)),
        "several dimensions": (base, (4, 24)),
        "empty": (base[:0], (24,)),
    }[layout]
    w = torch.randn(shape, device=place.device)

    def function(x, w):
        return call(op, FF, x, shape, w)

    expected = function(x, w)
    result = torch.compile(function, fullgraph=True, backend="aot_eager")(x, w)
    assert result.stride() == expected.stride() and result.shape == expected.shape
    torch.testing.assert_close(result, expected)
    dy = torch.randn_like(expected)
    results = [
        _forward_and_backward(f, [x, w], dy)
        for f in (torch.compile(function, fullgraph=True, backend="aot_eager"), function)
    ]
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


@both_ops
def test_the_graph_holds_the_kernels(op: str, place) -> None:
    """The operator that Dynamo sees is taken apart: forward and backward are one kernel each."""
    x, w = leaf(torch.randn(5, 24, device=place.device)), leaf(torch.randn(24, device=place.device))
    targets = _targets(lambda x, w: call(op, FF, x, (24,), w), x, w)
    kernels = [t for t in targets if t.startswith("fused_norm.")]
    prefix = {"native": "fused_norm.norm_", "triton": "fused_norm.triton_norm_"}.get(place.backend)
    expected = [] if prefix is None else [f"{prefix}forward.default", f"{prefix}backward.default"]
    assert kernels == expected, targets


@both_ops
def test_a_choice_of_backend_recompiles(op: str) -> None:
    """The graph names its backend and version: compiled graphs are cached on disk by what they hold."""
    graphs = []

    def compiler(graph, _):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(lambda x: call(op, FF, x, (24,)), fullgraph=True, backend=compiler)
    x = torch.randn(5, 24)
    compiled(x)
    for _ in range(2):
        with fused_norm.use_backend("reference"):
            compiled(x)
        compiled(x)
    assert len(graphs) == 2
    assert f"reference {fused_norm.__version__}" in graphs[1]
    assert f"reference {fused_norm.__version__}" not in graphs[0]


def test_the_choice_of_another_thread() -> None:
    """What one thread compiles is not what the next asked for by name: the choice made last counts, and is guarded."""
    graphs = []

    def compiler(graph, _):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(lambda x: FF.layer_norm(x, (24,)), fullgraph=True, backend=compiler)
    x = torch.randn(5, 24)
    with fused_norm.use_backend("reference"):
        thread = threading.Thread(target=compiled, args=(x,))
        thread.start()
        thread.join()
        compiled(x)
    assert graphs and all(f"reference {fused_norm.__version__}" in g for g in graphs)


def test_a_backend_that_cannot_run_raises() -> None:
    if fused_norm.available_backends()["triton"] is None:
        pytest.skip("triton can run here")
    with fused_norm.use_backend("triton"), pytest.raises(Exception, match="'triton' was asked for, but cannot run"):
        torch.compile(lambda x: FF.layer_norm(x, (24,)), fullgraph=True, backend="eager")(torch.randn(5, 24))


@both_ops
@pytest.mark.parametrize(
    "bad", [((5, 24), (23,), None), ((5, 24), (24,), (23,)), ((24,), (2, 24), None)], ids=["shape", "weight", "dims"]
)
def test_bad_input(op: str, bad) -> None:
    shape, normalized_shape, weight_shape = bad
    weight = None if weight_shape is None else torch.ones(weight_shape)
    error = exception_of(
        torch.compile(lambda x, w: call(op, FF, x, normalized_shape, w), backend="eager"), torch.ones(shape), weight
    )
    assert error is not None and str(normalized_shape[0]) in str(error)


INSIDE = {
    **{name: TRANSFORMS[name] for name in ("grad", "jvp", "vmap over weight", "per-sample gradients")},
    **{name: HIGHER[name] for name in ("hessian", "reverse over reverse", "Hessian-vector product")},
}


@both_ops
@pytest.mark.parametrize("transform", INSIDE)
def test_transform_inside_a_compiled_function(op: str, transform: str, device: str) -> None:
    """torch.func sees no derivative of an opaque operator there, and gives zeros without a word: ours must not."""
    inputs = _three(device, 3, 7)
    compiled = torch.compile(lambda *a: INSIDE[transform](_function(op, FF), a), fullgraph=True, backend="aot_eager")
    _close(compiled(*inputs), INSIDE[transform](_function(op, composite), inputs))


@both_ops
@pytest.mark.parametrize("transform", ["grad", "vmap over x", "jvp"])
def test_transform_of_a_compiled_function(op: str, transform: str, device: str) -> None:
    """The same values as of torch's own function compiled, or the same refusal."""
    inputs = _three(device)

    def attempt(namespace):
        return TRANSFORMS[transform](torch.compile(_function(op, namespace), backend="aot_eager"), inputs)

    refusal = exception_of(attempt, F)
    if refusal is not None:
        assert type(exception_of(attempt, FF)) is type(refusal)
        return
    _close(attempt(FF), TRANSFORMS[transform](_function(op, composite), inputs))


@both_ops
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside(op: str, reentrant: bool, device: str) -> None:
    from torch.utils.checkpoint import checkpoint

    x, w, dy = (torch.randn(*s, device=device) for s in ((5, 24), (24,), (5, 24)))

    def function(x, w):
        return checkpoint(lambda x, w: call(op, FF, x.sin(), (24,), w).cos(), x, w, use_reentrant=reentrant)

    results = []
    for f in (torch.compile(function, backend="aot_eager"), function):
        leaves = leaf(x), leaf(w)
        f(*leaves).backward(dy)
        results.append([t.grad for t in leaves])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


@both_ops
def test_compiled_autograd(op: str, place) -> None:
    """An eager call's backward inside a compiled one breaks the graph, and is right."""
    x, w = torch.randn(5, 24, device=place.device), torch.randn(24, device=place.device)

    def gradients():
        leaves = leaf(x), leaf(w)
        (call(op, FF, leaves[0], (24,), leaves[1]).sin().sum()).backward()
        return [t.grad for t in leaves]

    expected = gradients()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        result = gradients()
    for a, e in zip(result, expected, strict=True):
        torch.testing.assert_close(a, e)


@both_ops
def test_autocast_inside(op: str) -> None:
    x, w = torch.randn(5, 24), torch.randn(24)

    def function(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return call(op, FF, x @ torch.ones(24, 24), (24,), w)

    result, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(x, w), function(x, w)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected)


@pytest.mark.gpu
@both_ops
def test_cuda_graphs(op: str) -> None:
    """mode="reduce-overhead" records forward and backward in CUDA graphs and replays them."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), MODULES[op](64)).cuda()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn(8, 64, device="cuda")
        results = []
        for function in (compiled, model):
            model.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            y = function(x)
            y.sin().sum().backward()
            results.append([y.detach().clone(), *(p.grad.clone() for p in model.parameters())])
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- export


@both_ops
@pytest.mark.parametrize("strict", [False, True])
def test_export_and_reload(op: str, strict: bool, device: str) -> None:
    """The program holds torch's operators alone, so it runs, and can be lowered, where this package is not."""
    module = torch.nn.Sequential(torch.nn.Linear(16, 24), MODULES[op](24)).to(device).eval()
    x = torch.randn(5, 16, device=device)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert "fused_norm" not in str(program.graph)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    reloaded = torch.export.load(file).module()
    for rows in (5, 8):
        x = torch.randn(rows, 16, device=device)
        torch.testing.assert_close(reloaded(x), module(x))
    decomposed = program.run_decompositions()
    torch.testing.assert_close(decomposed.module()(x), module(x))


# ----------------------------------------------------------------------------------------------- tracing below autograd


@both_ops
def test_make_fx_traces_it(op: str, place) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(x, w):
        y = call(op, FF, x, (24,), w)
        return y, *torch.autograd.grad(y.sin().sum(), (x, w))

    x, w = (leaf(torch.randn(*s, device=place.device)) for s in ((5, 24), (24,)))
    for mode in ("real", "fake"):
        graph = make_fx(function, tracing_mode=mode)(x, w)
        other = leaf(torch.randn(5, 24, device=place.device))
        for a, e in zip(graph(other, w), function(other, w), strict=True):
            torch.testing.assert_close(a, e)


def test_fake_tensors(place) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.randn(5, 24, device=place.device, requires_grad=True)
        y = FF.layer_norm(x, (24,), torch.ones(24, device=place.device))
        y.sum().backward()
    assert (y.shape, y.dtype, y.device.type) == ((5, 24), torch.float32, place.device)
    assert x.grad.shape == x.shape


# ------------------------------------------------------------------------------------------------- operators and fakes


@both_ops
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_opcheck_of_the_compiled_operators(op: str, dtype: torch.dtype, place) -> None:
    if place.backend == "reference" and dtype not in (torch.float32, torch.bfloat16):
        pytest.skip("formulas are traced alike in all dtypes of one kind")
    plan = f"{place.backend} {fused_norm.__version__}"
    for requires_grad in (False, True):
        x = torch.randn(3, 4, 24).to(place.device, dtype).requires_grad_(requires_grad)
        w = torch.randn(24).to(place.device, dtype).requires_grad_(requires_grad)
        args = (x.transpose(0, 1), [24], w, None, 1e-5, plan) if op == "layer_norm" else (x, [24], w, None, plan)
        tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(getattr(torch.ops.fused_norm, op).default, args, test_utils=tests)
        bias = None if op == "rms_norm" else w
        for dropout_p, seed in ((0.0, None), (0.3, torch.tensor(7, device=place.device))):
            if place.backend == "torch" and seed is not None:
                continue  # torch's own dropout draws
            args = (x, x, [24], w, bias, 1e-5, op == "rms_norm", False, dropout_p, seed, plan)
            torch.library.opcheck(torch.ops.fused_norm.add_norm.default, args, test_utils=tests)


def _add_norm_calls(namespace, prefix: str, draw, dtype, param_dtype, accumulation, device: str):
    forward, backward = (getattr(namespace, f"{prefix}add_norm_{name}").default for name in ("forward", "backward"))
    weight, seed = draw(24, like=param_dtype), torch.tensor(5, device=device)
    wide = torch.float32 if dtype in LOW_PRECISION else dtype  # of a residual beside bf16 and fp16 input
    for residual_dtype in {dtype, wide}:
        if param_dtype not in (residual_dtype, torch.float32):
            continue
        x, r, dy = draw(6, 24), draw(6, 24, like=residual_dtype), draw(6, 24, like=residual_dtype)
        for rms, (p, s) in itertools.product((False, True), ((0.0, None), (0.3, seed))):
            stats = torch.rand(1 if rms else 2, 6, device=device, dtype=accumulation) + 0.5
            yield forward, (x, r, weight, None, s, 24, 1e-5, rms, p, True, False)
            for needs in ((True, True, True, not rms), (True, False, False, False), (False, True, True, False)):
                yield backward, (dy, dy, r, stats, weight, s, 24, rms, p, param_dtype, dtype, *needs)


def _kernel_calls(prefix: str, dtype: torch.dtype, param_dtype: torch.dtype, device: str):
    """Calls of the three kernels' operators, over layouts, groups, and what is asked for."""

    def draw(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape).to(device, like)

    namespace = torch.ops.fused_norm
    forward, backward, double_backward = (
        getattr(namespace, f"{prefix}norm_{name}").default for name in ("forward", "backward", "double_backward")
    )
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    yield from _add_norm_calls(namespace, prefix, draw, dtype, param_dtype, accumulation, device)
    for x in (draw(6, 24), draw(6, 40)[:, :24], draw(2, 3, 24)):
        for rms in (False, True):
            stats = torch.rand(1 if rms else 2, 6, device=device, dtype=accumulation) + 0.5
            for groups in (1, 3):
                weight, dy = draw(groups, 24, like=param_dtype), draw(6, 24)
                for need_stats in (False, True):
                    yield forward, (x, weight, None if rms else weight, 24, groups, 1e-5, rms, need_stats)
                for needs in ((True, True, not rms), (True, False, False), (False, True, False)):
                    yield backward, (dy, x, stats, weight, 24, groups, rms, param_dtype, *needs)
                for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
                    ddw = draw(groups, 24, like=param_dtype)
                    args = draw(6, 24), ddw, None, dy, x, stats, weight, 24, groups, rms, param_dtype, *needs
                    yield double_backward, args


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_fakes_of_the_kernels_operators(dtype: torch.dtype, place) -> None:
    """Shape, dtype, strides and device of every result, as the real operator gives them."""
    if place.backend not in ("native", "triton") or place.device != "cpu":
        pytest.skip("only native and triton have operators, and native has all three on the CPU")
    from torch._subclasses.fake_tensor import FakeTensorMode

    prefix = "" if place.backend == "native" else "triton_"
    for param_dtype in {dtype, torch.float32 if dtype in LOW_PRECISION else dtype}:
        for operator, args in _kernel_calls(prefix, dtype, param_dtype, place.device):
            real = operator(*args)
            with FakeTensorMode() as mode:
                fake = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
            for a, e in zip(fake, real, strict=True):
                same = (a.shape, a.dtype, a.stride(), a.device) == (e.shape, e.dtype, e.stride(), e.device)
                assert same, (operator, a, e.shape, e.stride(), e.dtype)
