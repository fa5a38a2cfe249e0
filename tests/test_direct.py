"""The native functions past torch's dispatcher (csrc/python.cpp), and the check of an ordinary call's arguments."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import fused_norm.functional as FF
from fused_norm import dispatch
from fused_norm import functional_norms as norms
from fused_norm.backends import native

pytestmark = pytest.mark.skipif(
    native.unavailable("cpu") is not None, reason=f"no native CPU backend: {native.unavailable('cpu')}"
)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F64, F64), (F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]


class Subclass(Tensor):
    pass


def operators():
    return torch.ops.fused_norm.norm_forward.default._op, torch.ops.fused_norm.norm_backward.default._op


def rand(*shape, dtype=F32):
    return torch.randn(*shape, dtype=F64).to(dtype)


def same(got, expected):
    assert type(got) is type(expected) is tuple and len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert type(a) is type(b) is Tensor and a.dtype == b.dtype
        assert a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()
        assert a.requires_grad == b.requires_grad and a.is_inference() == b.is_inference()
        assert a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))
    return True


# ------------------------------------------------------------------------------------------------------------- results


LAYOUTS = {
    "contiguous": lambda x: x.view(3, 4, -1),
    "rows": lambda x: x,
    "strided rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other row": lambda x: torch.stack([x, x], 1).view(-1, x.shape[1])[::2],
    "one row for all": lambda x: x[:1].expand(x.shape),
    "offset": lambda x: torch.cat([x.flatten().new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
def test_same_bits_as_the_operator(dtypes, layout, poisoned_empty):
    dtype, param_dtype = dtypes
    forward, backward = operators()
    double_backward = torch.ops.fused_norm.norm_double_backward.default
    n = 67
    x, dy = (LAYOUTS[layout](rand(12, n, dtype=dtype)) for _ in range(2))
    for rms in (False, True):
        for groups in (1, 4):
            for size in {n, groups * n}:
                weight, bias = rand(size, dtype=param_dtype), Parameter(rand(size, dtype=param_dtype), False)
                for w, b in ((weight, bias), (None, None), (weight, None), (None, bias)):
                    for need_stats, *cast in ((True,), (False,), (True, True), (True, False)):  # the last has a default
                        args = (x, w, b, n, groups, 1e-5, rms, need_stats, *cast)
                        ours, theirs = native.norm_forward(*args), forward(*args)
                        if need_stats:
                            assert same(ours, theirs)
                        else:  # an operator's result is a tensor, where a small call had better make none
                            assert same(ours[:1], theirs[:1])
                            assert ours[1] is None and theirs[1].shape == (0, 12)
                    stats = native.norm_forward(x, w, b, n, groups, 1e-5, rms, True)[1]
                    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
                        args = (dy, x, stats, w, n, groups, rms, param_dtype, *needs)
                        assert same(native.norm_backward(*args), backward(*args))
                    for ddw, ddb in ((w, b), (None, None)):
                        args = (x, ddw, ddb, dy, x, stats, w, n, groups, rms, param_dtype, True, True, True)
                        assert same(native.norm_double_backward(*args), double_backward(*args))


def test_arguments_that_the_operator_converts():
    """eps as an int, n as numpy's or a bool: whatever the operator takes."""
    forward = operators()[0]
    x, w = rand(2, 4), rand(4)
    for args in ((x, w, w, 4, 1, 1, False, True), (x, w, w, np.int64(4), 1, np.float32(1e-5), True, True)):
        assert same(native.norm_forward(*args), forward(*args))
    x = rand(3, 1)
    expected = forward(x, None, None, 1, 1, 1e-5, False, True)
    assert same(native.norm_forward(x, None, None, True, True, 1e-5, False, True), expected)
    assert same(native.norm_forward(x, None, None, 1, 1, 1e-5, 0, 1), expected)


def test_results_need_no_gradient():
    """autograd calls these functions. (The operator's results have a grad_fn that says there is no derivative.)"""
    x = rand(2, 4).requires_grad_()
    y, stats = native.norm_forward(x, x[0].detach().requires_grad_(), None, 4, 1, 1e-5, False, True)
    assert not y.requires_grad and not stats.requires_grad


def test_results_are_ordinary_tensors():
    """A tensor's every use must work: written over, resized, saved by autograd, and freed by the last reference."""
    y, stats = native.norm_forward(rand(2, 4), None, None, 4, 1, 1e-5, False, True)
    assert y._use_count() == stats._use_count() == 1 and y.untyped_storage().resizable()
    y.requires_grad_()
    (y * y).sum().backward()
    assert y.grad.equal(2 * y.detach())
    y.detach().resize_(9).zero_()


@pytest.mark.parametrize("inference_input", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_inference_mode(inference, inference_input):
    forward, backward = operators()
    with torch.inference_mode(inference_input):
        x, w = rand(2, 4), rand(4)
    with torch.inference_mode(inference):
        args = (x, w, w, 4, 1, 1e-5, False, True)
        got = native.norm_forward(*args)
        assert same(got, forward(*args)) and got[0].is_inference() == inference
        args = (x, x, got[1], w, 4, 1, False, F32, True, True, True)
        assert same(native.norm_backward(*args), backward(*args))
        assert FF.layer_norm(x, (4,), w).is_inference() == inference


# -------------------------------------------------------------------------------------------------------------- errors


def freed():
    x = torch.ones(2, 4)
    x.untyped_storage().resize_(0)
    return x


X, W = torch.ones(2, 4), torch.ones(4)
FORWARD_ERRORS = {
    "integer x": (torch.ones(2, 4, dtype=torch.int64), W, W, 4, 1, 1e-5, False, True),
    "n": (X, W, W, 0, 1, 1e-5, False, True),
    "not rows": (X, None, None, 3, 1, 1e-5, False, True),
    "groups": (X, W, W, 4, 3, 1e-5, False, True),
    "layout": (torch.ones(4, 2).t(), None, None, 4, 1, 1e-5, False, True),
    "weight's size": (X, torch.ones(5), None, 4, 1, 1e-5, False, True),
    "weight's dtype": (X, W.double(), None, 4, 1, 1e-5, False, True),
    "weight and bias": (X.bfloat16(), W, W.bfloat16(), 4, 1, 1e-5, False, True),
    "freed": (freed(), None, None, 4, 1, 1e-5, False, True),
    "sparse": (X.to_sparse(), None, None, 4, 1, 1e-5, False, True),
    "too few": (X, W, W, 4, 1, 1e-5, False),
    "too many": (X, W, W, 4, 1, 1e-5, False, True, True, True),
    "cast is text": (X, W, W, 4, 1, 1e-5, False, True, "x"),
    "none": (),
    "no tensor": ([1.0], W, W, 4, 1, 1e-5, False, True),
    "no x": (None, W, W, 4, 1, 1e-5, False, True),
    "n is a float": (X, W, W, 4.0, 1, 1e-5, False, True),
    "n is too large": (X, W, W, 1 << 70, 1, 1e-5, False, True),
    "eps is too large": (X, W, W, 4, 1, 1 << 2000, False, True),
    "eps is text": (X, W, W, 4, 1, "x", False, True),
}
BACKWARD_ERRORS = {
    "dy's dtype": (X.double(), X, torch.ones(2, 2), W, 4, 1, False, F32, True, True, True),
    "dy's size": (torch.ones(3, 4), X, torch.ones(2, 2), W, 4, 1, False, F32, True, True, True),
    "stats": (X, X, torch.ones(3, 2), W, 4, 1, False, F32, True, True, True),
    "param_dtype": (X, X, torch.ones(2, 2), None, 4, 1, False, F64, True, True, True),
    "param_dtype of another kind": (X, X, torch.ones(2, 2), None, 4, 1, False, torch.int32, True, True, True),
    "param_dtype is no dtype": (X, X, torch.ones(2, 2), None, 4, 1, False, "float32", True, True, True),
    "too few": (X, X, torch.ones(2, 2), W, 4, 1, False, F32, True, True),
}


@pytest.mark.parametrize(
    ("function", "args"),
    [
        pytest.param(k, args, id=f"{name}-{which}")
        for k, (name, cases) in enumerate((("forward", FORWARD_ERRORS), ("backward", BACKWARD_ERRORS)))
        for which, args in cases.items()
    ],
)
def test_errors_are_the_operators(function, args):
    with pytest.raises(Exception) as expected:
        operators()[function](*args)
    with pytest.raises(expected.type) as got:
        (native._C.norm_forward, native._C.norm_backward)[function](*args)
    assert type(got.value) is expected.type
    # what follows the first line may be a C++ stack
    assert str(got.value).split("\n")[0] == str(expected.value).split("\n")[0] != ""


def test_after_an_error_calls_go_on():
    for _ in range(3):
        with pytest.raises(RuntimeError, match="n is 0"):
            native.norm_forward(X, W, W, 0, 1, 1e-5, False, True)
        assert native.norm_forward(X, W, W, 4, 1, 1e-5, False, True)[0].shape == (2, 4)


# ------------------------------------------------------------------------------------------- when the operator must run

#: Prints how often the operators were called in each situation. They are replaced before anything has looked them up.
ROUTES = r"""
import json, sys, torch
exec(sys.argv[1])  # what to take from torch first
import fused_norm
from fused_norm.backends import native
from torch.utils._python_dispatch import TorchDispatchMode

calls = 0
for name in ("norm_forward", "norm_backward"):
    def counted(*args, op=getattr(torch.ops.fused_norm, name).default._op):
        global calls
        calls += 1
        return op(*args)
    getattr(torch.ops.fused_norm, name).default._op = counted

class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        return f(*args, **(kwargs or {}))
class Subclass(torch.Tensor):
    pass

x, w = torch.randn(2, 4), torch.randn(4)
stats = native.norm_forward(x, w, w, 4, 1, 1e-5, False, True)[1]
forward = lambda x=x, w=w: native.norm_forward(x, w, w, 4, 1, 1e-5, False, True)[0]
backward = lambda x=x, w=w: native.norm_backward(x, x, stats, w, 4, 1, False, torch.float32, True, True, True)[0]
result = {}
def route(name, f):
    global calls
    calls = 0
    try:
        f()
    except Exception as error:
        result[name] = [calls, type(error).__name__]
    else:
        result[name] = calls
def inside(context, f):
    def g():
        with context:
            f()
    return g
def both(name, context):
    route(f"forward, {name}", inside(context(), forward))
    route(f"backward, {name}", inside(context(), backward))

import contextlib
both("plain", contextlib.nullcontext)
result["row length"] = fused_norm.dispatch.plain_row_length(x, (4,), w, w)
if len(sys.argv) == 2:  # the rest loads much of torch
    print(json.dumps(result))
    sys.exit()
both("no_grad", torch.no_grad)
both("inference mode", torch.inference_mode)
both("autocast", lambda: torch.autocast("cpu"))
both("dispatch mode", Mode)
both("profiler", torch.autograd.profiler.profile)
for name, f in (("forward", forward), ("backward", backward)):
    route(f"{name}, vmap", lambda: torch.vmap(lambda t: (f(), t)[1])(torch.ones(3)))
    route(f"{name}, vmap over x", lambda: torch.vmap(f)(x[None]))
    route(f"{name}, grad", lambda: torch.func.grad(lambda t: (f(), t.sum())[1])(torch.ones(3)))
    route(f"{name}, jit.trace", lambda: torch.jit.trace(lambda t: f(t), x, check_trace=False))
    from torch.fx.experimental.proxy_tensor import make_fx
    route(f"{name}, make_fx", lambda: make_fx(lambda t: f(t))(x))
    route(f"{name}, make_fx before autograd", lambda: make_fx(lambda t: f(t), pre_dispatch=True)(x))
    route(f"{name}, functionalized", lambda: f(torch._to_functional_tensor(x)))
    def globally():
        torch._enable_functionalization(reapply_views=False)
        try:
            f()
        finally:
            torch._disable_functionalization()
    route(f"{name}, functionalization", globally)
    route(f"{name}, parameters", lambda: f(torch.nn.Parameter(x), torch.nn.Parameter(w)))
    route(f"{name}, subclass", lambda: f(x.as_subclass(Subclass)))
    route(f"{name}, subclass as weight", lambda: f(x, w.as_subclass(Subclass)))
    route(f"{name}, ZeroTensor", lambda: f(torch._efficientzerotensor(2, 4)))
    freed = x.clone()
    freed.untyped_storage().resize_(0)
    route(f"{name}, freed", lambda: f(freed))
from torch._subclasses import FakeTensorMode
with FakeTensorMode() as mode:
    fake = torch.empty(2, 4), torch.empty(4)
route("forward, fake", lambda: forward(*fake))
route("forward, in the mode", inside(mode, lambda: forward(*fake)))
route("forward, meta", lambda: forward(x.to("meta"), w.to("meta")))
print(json.dumps(result))
"""


def routes(before="", *more) -> dict:
    env = {**os.environ, "PYTHONPATH": str(Path(native.__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", "-c", ROUTES, before, *more]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_routes():
    """What runs past the dispatcher and what must not: the count of the operator's calls, and the error if one came."""
    found = routes("", "all")
    assert found.pop("row length") == 4
    past = {"plain", "no_grad", "inference mode", "autocast", "parameters"}
    for situation, calls in found.items():
        count, error = calls if isinstance(calls, list) else (calls, None)
        assert (count == 0) == (situation.split(", ")[1] in past), (situation, calls)
        assert error == "RuntimeError" or not situation.endswith("freed"), (situation, calls)


@pytest.mark.parametrize(
    "gone",
    [
        "torch._C._aoti.unsafe_alloc_void_ptr_from_tensor",
        "torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr",
        "torch.Tensor.__dlpack_c_exchange_api__",
    ],
)
def test_a_torch_without_the_doors(gone):
    found = routes(f"del {gone}")
    assert found["row length"] == 0 and found["forward, plain"] == found["backward, plain"] == 1


@pytest.mark.parametrize("change", ["returns another tensor", "fails"])
def test_a_torch_whose_doors_changed(change):
    body = "torch.empty(0)" if change == "returns another tensor" else "1 / 0"
    found = routes(f"torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr = lambda handle: {body}")
    assert found["row length"] == 0 and found["forward, plain"] == 1


def test_dispatch_mode_sees_the_operator():
    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            seen.append(str(f))
            return f(*args, **(kwargs or {}))

    x, w = rand(2, 4).requires_grad_(), rand(4)
    with Spy():
        FF.layer_norm(x, (4,), w, w).backward(X)
    assert "fused_norm.norm_forward.default" in seen and "fused_norm.norm_backward.default" in seen


def test_profiler_lists_the_operator():
    x, w = rand(2, 4).requires_grad_(), rand(4)
    with torch.autograd.profiler.profile() as profile:
        FF.layer_norm(x, (4,), w, w).backward(X)
    assert {"fused_norm::norm_forward", "fused_norm::norm_backward"} <= {e.name for e in profile.function_events}


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_records_the_operator(pre_dispatch):
    """A call past the dispatcher would leave this input's result in the graph as a constant."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x, w = rand(2, 4), rand(4)
    graph = make_fx(lambda t: FF.layer_norm(t, (4,), w, w), pre_dispatch=pre_dispatch)(x)
    other = rand(2, 4)
    assert graph(other).equal(FF.layer_norm(other, (4,), w, w))


def test_transforms_and_fakes():
    x, w = rand(3, 2, 4), rand(4)
    expected = torch.stack([FF.layer_norm(t, (4,), w, w) for t in x])
    torch.testing.assert_close(torch.vmap(lambda t: FF.layer_norm(t, (4,), w, w))(x), expected)
    got = torch.func.grad(lambda t: (FF.layer_norm(t, (4,), w, w) ** 3).sum())(x)
    leaf = x.clone().requires_grad_()
    (FF.layer_norm(leaf, (4,), w, w) ** 3).sum().backward()
    torch.testing.assert_close(got, leaf.grad)

    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert FF.layer_norm(torch.empty(2, 4), (4,), torch.empty(4)).shape == (2, 4)
    assert type(FF.layer_norm(x.as_subclass(Subclass), (4,), w, w)) is Subclass


# -------------------------------------------------------------------------------------------------- references, threads


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def call_quietly(f, args):
    with contextlib.suppress(RuntimeError, TypeError):
        f(*args)


def reference_counts(args):
    """Python's and C++'s, of those that nothing else in the process uses."""
    return [(sys.getrefcount(a), a._use_count()) for a in args if isinstance(a, Tensor)]


STATS = torch.ones(2, 2)
LEAKS = {
    "forward": (lambda *a: native._C.norm_forward(*a), (X, W, W, 4, 1, 1e-5, False, True)),
    "backward": (lambda *a: native._C.norm_backward(*a), (X, X, STATS, W, 4, 1, False, F32, True, True, True)),
    "by the operator": (lambda *a: native._C.norm_forward(*a), (X, W, W, 4, True, 1e-5, 0, 1)),
    "a check fails": (lambda *a: native._C.norm_forward(*a), (X, W, W, 0, 1, 1e-5, False, True)),
    "an argument fails": (lambda *a: native._C.norm_forward(*a), (X, W, "bias", 4, 1, 1e-5, False, True)),
    "row length": (lambda *a: native._C.plain_row_length(*a), (X, [4], W, W)),
    "no row length": (lambda *a: native._C.plain_row_length(*a), (X, (4,), W.double(), W)),
    "no metadata": (lambda *a: native._C.plain_row_length(*a), (X, (4,), W.to_sparse(), W)),
}


@pytest.mark.parametrize("case", LEAKS)
def test_no_leaks(case):
    f, args = LEAKS[case]
    calls = 300 if case == "no metadata" else 30_000  # as many tensors are 17 MB and more
    for _ in range(calls // 10):
        call_quietly(f, args)
    gc.collect()
    counts = reference_counts(args)
    before, objects = resident(), len(gc.get_objects())
    for _ in range(calls):
        call_quietly(f, args)
    gc.collect()
    assert reference_counts(args) == counts
    assert len(gc.get_objects()) - objects < 100
    assert resident() - before < 8 << 20


def test_a_torch_that_takes_the_handle():
    """alloc_tensor_by_stealing_from_void_ptr leaves the handle to its caller; its plural sister does take it."""
    code = """
a = torch._C._aoti
plural = a.alloc_tensors_by_stealing_from_void_ptrs
a.alloc_tensor_by_stealing_from_void_ptr = lambda handle: plural([handle])[0]
import resource, fused_norm._C as C
x = torch.ones(2, 4)
for i in range(30000):
    y, stats = C.norm_forward(x, None, None, 4, 1, 1e-5, False, True)
    assert y._use_count() == 1
    if i == 3000: before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3000
"""
    found = routes(code)
    assert found["row length"] == 4 and found["forward, plain"] == 0


def test_many_threads():
    """Small calls and calls that share torch's pool, from many threads at once: each gets its own result."""
    inputs = [rand(m, n) for m, n in ((1, 64), (3, 100), (300, 1000))]
    expected = [native.norm_forward(x, None, None, x.shape[1], 1, 1e-5, False, True) for x in inputs]
    grads = [
        native.norm_backward(x, x, s, None, x.shape[1], 1, False, F32, True, True, True)
        for x, (_, s) in zip(inputs, expected, strict=True)
    ]
    failures, barrier = [], threading.Barrier(8)

    def work(k):
        try:
            barrier.wait()
            for i in range(60):
                j = (i + k) % 3
                x, n = inputs[j], inputs[j].shape[1]
                assert dispatch.plain_row_length(x, (n,), None, None) == n
                y, stats = native.norm_forward(x, None, None, n, 1, 1e-5, False, True)
                assert same((y, stats), expected[j])
                assert same(native.norm_backward(x, x, stats, None, n, 1, False, F32, True, True, True), grads[j])
                with pytest.raises(RuntimeError):
                    native.norm_forward(x, None, None, 0, 1, 1e-5, False, True)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_the_gil_is_free_while_a_kernel_runs():
    """Another Python thread gets on while a long call is under way."""
    x = rand(1000, 2000)
    progress, stop = [], threading.Event()

    def count():
        while not stop.is_set():
            progress.append(None)
            time.sleep(1e-4)

    before = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    sys.setswitchinterval(100)  # the GIL changes hands where it is given up, and nowhere else
    try:
        thread.start()
        grew, kept = 0, []  # freeing a tensor gives up the GIL too
        for _ in range(10):
            start = len(progress)
            kept.append(native.norm_forward(x, None, None, 2000, 1, 1e-5, False, False))
            grew += len(progress) > start
    finally:
        stop.set()
        sys.setswitchinterval(before)
        thread.join()
    assert grew


# --------------------------------------------------------------------------------------------------- an ordinary call


def neg(t):
    return torch._neg_view(t)


def sized(x, *shape):
    return rand(*shape).to(x.dtype)


class IntSubclass(int):
    pass


class TupleSubclass(tuple):
    pass


V = rand(2, 3, 4)
P = rand(4)
P2 = rand(3, 4)
#: name -> (x, normalized_shape, weight, bias), the number it must give
ROW_LENGTHS = {
    "tuple": ((V, (4,), P, P), 4),
    "list": ((V, [4], P, P), 4),
    "Size": ((V, torch.Size([3, 4]), P2, P2), 12),
    "all of x": ((V, (2, 3, 4), None, None), 24),
    "no weight": ((V, (4,), None, P), 4),
    "no bias": ((V, (4,), P, None), 4),
    "parameters": ((Parameter(V), (4,), Parameter(P), Parameter(P)), 4),
    "needs a gradient": ((V.clone().requires_grad_() * 1, (4,), P.clone().requires_grad_(), None), 4),
    "float64": ((V.double(), (4,), P.double(), P.double()), 4),
    "bfloat16": ((V.bfloat16(), (4,), P.bfloat16(), P.bfloat16()), 4),
    "float16": ((V.half(), (4,), P.half(), None), 4),
    "float32 beside bfloat16": ((V.bfloat16(), (4,), P, P), 4),
    "float32 beside float16": ((V.half(), (4,), None, P), 4),
    "x is transposed": ((V.transpose(0, 1), (4,), P, P), 4),
    "x is expanded": ((V[:1].expand(5, 3, 4), (4,), P, P), 4),
    "one element": ((torch.ones(1), (1,), torch.ones(1), torch.ones(1)), 1),
    "a weight whose strides do not count": ((torch.ones(2, 1, 4), (1, 4), P.as_strided((1, 4), (77, 1)), None), 4),
    "a weight inside another tensor": ((V, (4,), rand(9)[3:7], None), 4),
    # shapes
    "empty shape": ((V, (), None, None), 0),
    "other size": ((V, (5,), None, None), 0),
    "other leading size": ((V, (2, 4), None, None), 0),
    "longer than x": ((P, (3, 4), None, None), 0),
    "negative": ((V, (-1,), None, None), 0),
    "int": ((V, 4, None, None), 0),
    "bool": ((torch.ones(2, 1), (True,), None, None), 0),
    "numpy": ((V, (np.int64(4),), None, None), 0),
    "numpy array": ((V, np.array([4]), None, None), 0),
    "an int subclass": ((V, (IntSubclass(4),), None, None), 0),
    "a tuple subclass": ((V, TupleSubclass((4,)), None, None), 0),
    "float": ((V, (4.0,), None, None), 0),
    "too large for C": ((V, (1 << 70,), None, None), 0),
    "text": ((V, "4", None, None), 0),
    "None": ((V, None, None, None), 0),
    "x has no elements": ((torch.ones(0, 4), (4,), P, P), 0),
    "a row has no elements": ((torch.ones(2, 0), (0,), None, None), 0),
    "x is a scalar": ((torch.tensor(1.0), (1,), None, None), 0),
    # x
    "x is a list": (([1.0], (1,), None, None), 0),
    "x is None": ((None, (4,), None, None), 0),
    "x is a subclass": ((V.as_subclass(Subclass), (4,), P, P), 0),
    "x is an integer": ((V.long(), (4,), None, None), 0),
    "x is complex": ((V.cfloat(), (4,), None, None), 0),
    "x is float8": ((V.to(torch.float8_e5m2), (4,), None, None), 0),
    "x is sparse": ((V.to_sparse(), (4,), None, None), 0),
    "x is nested": ((torch.nested.nested_tensor([P2, P2], layout=torch.strided), (4,), None, None), 0),
    "x is jagged": ((torch.nested.nested_tensor([P2, P2], layout=torch.jagged), (4,), None, None), 0),
    "x is meta": ((V.to("meta"), (4,), P.to("meta"), None), 0),
    "x has a sign pending": ((neg(V), (4,), P, P), 0),
    "x is a ZeroTensor": ((torch._efficientzerotensor(2, 4), (4,), P, P), 0),
    "x is freed": ((freed(), (4,), None, None), 0),
}
for name, put in {"weight": lambda p: (p, None), "bias": lambda p: (None, p)}.items():
    ROW_LENGTHS |= {
        f"{name}'s size": ((V, (4,), *put(rand(5))), 0),
        f"{name}'s dimensions": ((V, (4,), *put(rand(1, 4))), 0),
        f"{name} has a dimension more": ((V, (4,), *put(rand(4, 1))), 0),
        f"{name}'s shape": ((V, (3, 4), *put(rand(4, 3))), 0),
        f"{name} is flat": ((V, (3, 4), *put(rand(12))), 0),
        f"{name} is strided": ((V, (4,), *put(rand(8)[::2])), 0),
        f"{name} is expanded": ((V, (4,), *put(rand(1).expand(4))), 0),
        f"{name} is transposed": ((V, (3, 4), *put(rand(4, 3).t())), 0),
        f"{name} is float64": ((V, (4,), *put(P.double())), 0),
        f"{name} is bfloat16": ((V, (4,), *put(P.bfloat16())), 0),
        f"{name} is float32 beside float64": ((V.double(), (4,), *put(P)), 0),
        f"{name} is float16 beside bfloat16": ((V.bfloat16(), (4,), *put(P.half())), 0),
        f"{name} is bfloat16 beside float16": ((V.half(), (4,), *put(P.bfloat16())), 0),
        f"{name} is an integer": ((V, (4,), *put(P.long())), 0),
        f"{name} is meta": ((V, (4,), *put(P.to("meta"))), 0),
        f"{name} is sparse": ((V, (4,), *put(P.to_sparse())), 0),
        f"{name} is a subclass": ((V, (4,), *put(P.as_subclass(Subclass))), 0),
        f"{name} is a float": ((V, (4,), *put(1.0)), 0),
        f"{name} has a sign pending": ((V, (4,), *put(neg(P))), 0),
        f"{name} is a parameter with a sign pending": ((V, (4,), *put(Parameter(neg(P)))), 0),
        f"{name} is a ZeroTensor": ((V, (4,), *put(torch._efficientzerotensor(4))), 0),
        f"{name} is freed": ((freed().new_ones(2, 2, 4), (2, 4), *put(freed())), 0),
    }
ROW_LENGTHS |= {
    "weight and bias differ": ((V.bfloat16(), (4,), P, P.bfloat16()), 0),
    "bias and weight differ": ((V.bfloat16(), (4,), P.bfloat16(), P), 0),
}


@pytest.mark.parametrize("case", ROW_LENGTHS)
def test_plain_row_length(case):
    """What it takes for ordinary, Python's checks find nothing wrong with, and leave as it is."""
    args, expected = ROW_LENGTHS[case]
    assert dispatch.plain_row_length(*args) == expected
    if expected:
        x, shape, weight, bias = args
        assert type(x) in norms.PLAIN and norms.row_length(False, x, shape, weight, bias) == expected
        for rms in (False, True):
            if (weight is not None or bias is not None) and not (rms and weight is None):
                checked = [norms.dense(p) for p in norms.checked_params(rms, x, shape, weight, None if rms else bias)]
                assert checked[0] is weight and checked[1] is (None if rms else bias)


def test_plain_row_length_by_chance():
    """Over every pair of kinds of argument: never more than Python's checks would let through."""
    tensors = [
        rand(4),
        rand(4).double(),
        rand(4).half(),
        rand(8)[::2],
        neg(rand(4)),
        rand(3, 4),
        None,
        rand(4).bfloat16(),
    ]
    taken = 0
    for x in (V, V.double(), V.half(), V.bfloat16(), V.long(), V[:0]):
        for shape in ((4,), (3, 4), [4], (), (12,)):
            for weight in tensors:
                for bias in tensors:
                    n = dispatch.plain_row_length(x, shape, weight, bias)
                    try:
                        ordinary = x.numel() and norms.row_length(False, x, shape, weight, bias)
                        if ordinary and (weight is not None or bias is not None):
                            params = [norms.dense(p) for p in norms.checked_params(False, x, shape, weight, bias)]
                            ordinary *= params[0] is weight and params[1] is bias
                    except (RuntimeError, NotImplementedError):
                        ordinary = 0
                    assert n == ordinary, (x.dtype, shape, weight, bias)
                    taken += n > 0
    assert taken > 50


def test_plain_row_length_under_modes():
    args = V, (4,), P, P
    assert dispatch.plain_row_length(*args) == 4
    with torch.device("cpu"):
        assert dispatch.plain_row_length(*args) == 0
    torch.set_default_device("cpu")
    try:
        assert dispatch.plain_row_length(*args) == 0
    finally:
        torch.set_default_device(None)
    with torch.device("cpu"), torch._C.DisableTorchFunction():
        assert dispatch.plain_row_length(*args) == 4
    found = []
    torch.vmap(lambda t: (found.append(dispatch.plain_row_length(t, (4,), P, P)), t)[1])(V)
    torch.func.grad(lambda t: (found.append(dispatch.plain_row_length(*args)), t.sum())[1])(V)
    assert found == [0, 0]
    assert dispatch.plain_row_length(*args) == 4


@pytest.mark.gpu
def test_plain_row_length_on_devices():
    x, p = V.cuda(), P.cuda()
    assert dispatch.plain_row_length(x, (4,), p, p) == 4
    assert dispatch.plain_row_length(x, (4,), P, None) == dispatch.plain_row_length(V, (4,), None, p) == 0


def test_plain_row_length_takes_four():
    with pytest.raises(TypeError, match="4 arguments, 1 given"):
        native._C.plain_row_length(V)


def test_functional_agrees_with_and_without_it(monkeypatch):
    """The check is a short cut: without it each call does the same, or raises the same."""

    def outcome(args):
        results = []
        for call in (lambda: FF.layer_norm(*args), lambda: FF.rms_norm(*args[:3])):
            try:
                results.append(call())
            except Exception as error:
                results.append((type(error), str(error)))
        return results

    calls = [args for name, (args, _) in ROW_LENGTHS.items() if not name.startswith("x is")]
    quick = [outcome(args) for args in calls]
    monkeypatch.setattr(dispatch, "plain_row_length", lambda *args: 0)
    for args, short in zip(calls, quick, strict=True):
        for got, expected in zip(short, outcome(args), strict=True):
            assert type(got) is type(expected)
            assert got == expected if isinstance(got, tuple) else (got.is_meta or got.equal(expected)), args
