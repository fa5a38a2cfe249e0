"""The life of a norm module in other people's code: copies, conversions, hooks, parametrisations, checkpointing, saved
tensors, mixed precision, optimisers, and the data-parallel wrappers.

Whatever torch's own module does there, ours does. Every test runs the two side by side: ``both`` gives them with the
same parameters.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as prune
import worker_distributed
from cases import DTYPES, OPS, assert_same_bits, call, exception_of, leaf
from subprocesses import Outcomes, assert_passed, run_worker
from torch import Tensor, nn

import fused_norm
import fused_norm.functional as FF

# torch's rms_norm warns once in a process of low-precision input beside fp32 weights.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

N = 24
CLASSES = {"LayerNorm": (nn.LayerNorm, fused_norm.LayerNorm), "RMSNorm": (nn.RMSNorm, fused_norm.RMSNorm)}


@pytest.fixture(params=CLASSES)
def both(request: pytest.FixtureRequest) -> Callable[..., tuple[nn.Module, nn.Module]]:
    """Makes (torch's module, ours) with the same random parameters."""

    def make(shape=N, **kwargs) -> tuple[nn.Module, nn.Module]:
        theirs, ours = (cls(shape, **kwargs) for cls in CLASSES[request.param])
        with torch.no_grad():
            for p in theirs.parameters():
                p.copy_(torch.randn(p.shape) * 0.3 + 1)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        return theirs, ours

    return make


def _close(ours, theirs, tolerance: float = 1e-5) -> None:
    ours, theirs = (torch.utils._pytree.tree_leaves(t) for t in (ours, theirs))
    assert len(ours) == len(theirs)
    for a, e in zip(ours, theirs, strict=True):
        assert type(a) is type(e)
        if isinstance(e, Tensor):
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)
        else:
            assert a == e


def _pass(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output and the gradients of x and of every parameter."""
    x = leaf(x)
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]


def _data(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, N).to(dtype), torch.randn(*shape, N).to(dtype)


# --------------------------------------------------------------------------------------- state, copies and conversions


def test_state_dict_through_a_file_of_weights_only(both, tmp_path: Path) -> None:
    theirs, ours = both()
    x, dy = _data(5)
    for saved, loaded in ((theirs, ours), (ours, theirs)):
        torch.save(saved.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        with torch.no_grad():
            for p in loaded.parameters():
                p.zero_()
        loaded.load_state_dict(state, strict=True)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_same_bits(p.detach(), q.detach())
    _close(_pass(ours, x, dy), _pass(theirs, x, dy))


def test_a_whole_module_is_loaded_by_weights_only_as_torchs_is(both) -> None:
    """A class is code: torch refuses its own class as it refuses ours, until the user names it as safe."""
    for module in both():
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        with pytest.raises(pickle.UnpicklingError, match=type(module).__name__):
            torch.load(file, weights_only=True)


def test_strict_loading_complains_of_the_same_keys(both) -> None:
    theirs, ours = both()
    state = theirs.state_dict()
    spoilt = [
        {k: v for k, v in state.items() if k != "weight"},
        state | {"scale": torch.ones(N)},
        state | {"weight": torch.ones(N + 1)},
        {},
    ]
    for bad in spoilt:
        errors = [exception_of(m.load_state_dict, bad, strict=True) for m in (theirs, ours)]
        assert type(errors[0]) is type(errors[1]) is RuntimeError
        assert str(errors[0]) == str(errors[1])
        results = [
            exception_of(m.load_state_dict, bad, strict=False) or tuple(m.load_state_dict(bad, strict=False))
            for m in (theirs, ours)
            if bad.get("weight", torch.ones(N)).shape == (N,)
        ]
        assert results == results[:1] * len(results)


def test_assigned_state_dict_and_meta_device(both) -> None:
    """The usual way to load a large model: built on meta, its Parameters are those of the file."""
    theirs, ours = both()
    empty = type(ours)(N, device="meta")
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    empty.load_state_dict(state, assign=True, strict=True)
    assert empty.weight.data_ptr() == state["weight"].data_ptr()
    x, dy = _data(5)
    _close(_pass(empty, x, dy), _pass(theirs, x, dy))


def test_to_empty_and_reset_parameters(both) -> None:
    for module in both():
        kept = module.to(torch.bfloat16).to("meta")
        assert kept is module and module.weight.is_meta
        y = module(torch.empty(5, N, dtype=torch.bfloat16, device="meta", requires_grad=True))
        y.backward(torch.empty_like(y))
        assert module.weight.grad.is_meta and module.weight.grad.dtype == torch.bfloat16
        with pytest.raises(NotImplementedError, match="to_empty"):
            module.to("cpu")
        module.to_empty(device="cpu").reset_parameters()
        assert_same_bits(module.weight.detach(), torch.ones(N, dtype=torch.bfloat16))
        assert module.weight.dtype == torch.bfloat16 and module.weight.requires_grad


def test_skip_init(both) -> None:
    for module in both():
        made = nn.utils.skip_init(type(module), N, eps=0.5, dtype=torch.float64)
        assert type(made) is type(module) and made.weight.dtype == torch.float64 and made.eps == 0.5


CONVERSIONS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "float": lambda m: m.double().float(),
    "to dtype": lambda m: m.to(torch.bfloat16),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
    "to like a tensor": lambda m: m.to(torch.ones((), dtype=torch.float64)),
    "type": lambda m: m.type(torch.float64),
    "cpu": lambda m: m.cpu(),
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversion_after_backward(conversion: str, both) -> None:
    """Parameters stay the same objects, their gradients are converted with them, and training goes on."""
    modules = both()
    x, dy = _data(5)
    outcomes = []
    for module in modules:
        module(x).backward(dy)
        before = list(module.parameters())
        assert CONVERSIONS[conversion](module) is module
        after = list(module.parameters())
        assert all(p is q for p, q in zip(before, after, strict=True))
        dtype = module.weight.dtype
        assert all(p.dtype == p.grad.dtype == dtype for p in after)
        y = module(x.to(dtype))
        y.backward(dy.to(dtype))
        assert y.dtype == dtype
        outcomes.append([y.detach(), *(p.grad for p in after)])
    tolerance = max(1e-5, 16 * torch.finfo(outcomes[0][0].dtype).eps)
    _close(outcomes[1], outcomes[0], tolerance)


@pytest.mark.parametrize("of", DTYPES, ids=str)
@pytest.mark.parametrize("given", DTYPES, ids=str)
def test_module_of_one_dtype_given_another(of: torch.dtype, given: torch.dtype, both) -> None:
    """The dtypes that torch's module takes, ours takes, with the same dtype out; the others raise the same class."""
    theirs, ours = (m.to(of) for m in both())
    x = torch.randn(5, N).to(given)
    errors = [exception_of(m, x) for m in (theirs, ours)]
    assert type(errors[0]) is type(errors[1])
    if errors[0] is None:
        assert ours(x).dtype == theirs(x).dtype
        _close(ours(x), theirs(x), 2e-2)


def test_a_copy_carries_its_hooks_gradients_and_flags(both) -> None:
    outcomes = []
    for module in both():
        module.weight.requires_grad_(False)
        module.note = ["mine"]
        module.eval()
        module(torch.ones(3, N, requires_grad=True)).sum().backward()
        clone = copy.deepcopy(module)
        shallow = copy.copy(module)
        assert type(clone) is type(shallow) is type(module)
        assert shallow.weight is module.weight and clone.weight is not module.weight
        outcomes.append((clone.weight.requires_grad, clone.training, clone.note, [p.grad for p in clone.parameters()]))
    _close(*outcomes)


def test_traced_by_fx(both) -> None:
    theirs, ours = both()
    x, dy = _data(5)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), ours))
    _close(_pass(traced, x, dy), _pass(theirs, x, dy))


def test_compiled_in_place(both) -> None:
    torch._dynamo.reset()
    theirs, ours = both()
    x, dy = _data(5)
    expected = _pass(theirs, x, dy)
    keys = list(ours.state_dict())
    ours.compile(backend="aot_eager", fullgraph=True)
    _close(_pass(ours, x, dy), expected)
    assert list(ours.state_dict()) == keys
    clone = copy.deepcopy(ours)
    _close(_pass(clone, x, dy), expected)


# ------------------------------------------------------------------------------------- parametrised and shared weights


class Exponential(nn.Module):
    """A positive weight, from one of any sign."""

    def forward(self, p: Tensor) -> Tensor:
        return p.exp()

    def right_inverse(self, p: Tensor) -> Tensor:
        return p.abs().log()


PARAMETRISATIONS = {
    "exponential": lambda m: parametrize.register_parametrization(m, "weight", Exponential()),
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m, "weight", dim=None),
    "spectral_norm": lambda m: nn.utils.parametrizations.spectral_norm(m, "weight"),
    "orthogonal": lambda m: nn.utils.parametrizations.orthogonal(m, "weight"),
    "old weight_norm": lambda m: nn.utils.weight_norm(m, "weight", dim=None),
    "prune": lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("patched", [False, True], ids=["built", "patched"])
@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_parametrised_weight(name: str, patched: bool, both) -> None:
    """The weight is a function of other parameters: forward, backward to those, state_dict, copies, and removal."""
    theirs, ours = both((4, 6))
    if patched:
        ours = copy.deepcopy(theirs)
        fused_norm.patch(ours)
    x, dy = torch.randn(5, 4, 6), torch.randn(5, 4, 6)
    outcomes = []
    for module in (theirs, ours):
        torch.manual_seed(0)  # orthogonal and spectral_norm draw
        PARAMETRISATIONS[name](module)
        outcome = [sorted(module.state_dict()), sorted(k for k, _ in module.named_parameters())]
        outcome += _pass(module, x, dy)
        if name in ("exponential", "spectral_norm"):  # torch cannot copy the weights of the others
            outcome += _pass(copy.deepcopy(module.eval()), x, dy)
        if name == "old weight_norm":
            nn.utils.remove_weight_norm(module)
        elif name == "prune":
            prune.remove(module, "weight")
        else:
            with parametrize.cached():
                outcome += _pass(module, x, dy)
            parametrize.remove_parametrizations(module, "weight")
        assert isinstance(module.weight, nn.Parameter)
        outcome += _pass(module, x, dy)
        outcomes.append(outcome)
    _close(outcomes[1], outcomes[0], 1e-4)
    assert type(ours) in (fused_norm.LayerNorm, fused_norm.RMSNorm)


def test_functional_call_with_other_parameters(both) -> None:
    """Stateless calls see the parameters given, pass gradients to them, and leave the module's own alone."""
    outcomes = []
    x, dy = _data(5)
    state = {"weight": torch.randn(N)}
    for module in both():
        given = {k: leaf(v) for k, v in state.items()}
        kept = module.weight
        y = torch.func.functional_call(module, given, (x,))
        outcomes.append([y.detach(), *torch.autograd.grad(y, list(given.values()), dy)])
        assert module.weight is kept and kept.grad is None
    _close(*outcomes)


def test_one_parameter_in_two_norms(both) -> None:
    outcomes = []
    x, dy = _data(5)
    for module in both():
        model = nn.Sequential(module, nn.ReLU(), copy.deepcopy(module))
        model[2].weight = model[0].weight
        assert len(list(model.parameters())) < 2 * len(list(module.parameters()))
        model(x).backward(dy)
        outcomes.append([model[0].weight.grad, *(p.grad for p in model.parameters())])
        assert model[2].weight.grad is model[0].weight.grad
        # Tied in a copy and after conversion too.
        assert copy.deepcopy(model)[0].weight is not model[0].weight
        clone = copy.deepcopy(model).double()
        assert clone[0].weight is clone[2].weight
    _close(*outcomes)


# -------------------------------------------------------------------------------------------------------------- hooks


def _watched(module: nn.Module, x: Tensor, dy: Tensor) -> list:
    """Everything that hooks of every kind see in a forward and a backward, in order."""
    seen: list = []

    def note(name: str) -> Callable:
        def hook(*args):
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if not isinstance(t, nn.Module)]
            seen.append([name, *(t.detach().clone() if isinstance(t, Tensor) else t for t in tensors)])

        return hook

    module.register_forward_pre_hook(note("forward pre"))
    module.register_forward_pre_hook(note("forward pre with keywords"), with_kwargs=True)
    module.register_forward_hook(note("forward"))
    module.register_forward_hook(note("forward with keywords"), with_kwargs=True, always_call=True)
    module.register_full_backward_pre_hook(note("backward pre"))
    module.register_full_backward_hook(note("backward"))
    for name, p in module.named_parameters():
        p.register_hook(note(f"{name} gradient"))
        p.register_post_accumulate_grad_hook(note(f"{name} accumulated"))
    x = leaf(x)
    x.register_hook(note("input gradient"))
    between = x * 2
    between.retain_grad()
    between.register_hook(note("intermediate gradient"))
    torch.autograd.graph.register_multi_grad_hook([x, between], note("all gradients"))
    y = module(between)
    y.register_hook(note("output gradient"))
    y.grad_fn.register_prehook(note("node before"))
    (y * y).backward(dy)
    seen.append(["end", y.detach(), x.grad, between.grad, *(p.grad for p in module.parameters())])
    return sorted(seen, key=lambda entry: entry[0])


def test_hooks_of_every_kind_see_what_torchs_module_shows_them(both) -> None:
    """The same calls, as many of them, with the same values."""
    x, dy = _data(5)
    theirs, ours = (_watched(m, x, dy) for m in both())
    assert [e[0] for e in ours] == [e[0] for e in theirs]
    # Our node has the statistics for a second output, whose gradient is None.
    for a, e in zip(ours, theirs, strict=True):
        if e[0] == "node before":
            a, e = a[:2], e[:2]
        _close(a, e)


def test_hooks_may_change_what_passes(both) -> None:
    x, dy = _data(5)
    outcomes = []
    for module in both():
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2 + 1,))
        module.register_forward_hook(lambda m, args, out: out.mul_(3))  # writing over the output is allowed
        module.register_full_backward_pre_hook(lambda m, grads: (grads[0] * 0.5,))
        module.weight.register_hook(lambda g: g.clamp(-0.1, 0.1))
        outcomes.append(_pass(module, x, dy))
    _close(*outcomes)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_backward_hooks_where_the_input_takes_no_gradient(both) -> None:
    x, dy = _data(5)
    outcomes = []
    for module in both():
        seen: list = []
        module.register_full_backward_hook(lambda m, gi, go, seen=seen: seen.append((gi, go)))
        module(x).backward(dy)
        outcomes.append([len(seen), seen[0][0][0] is None, seen[0][1][0]])
    _close(*outcomes)


def test_hooks_on_all_modules(both) -> None:
    outcomes = []
    for module in both():
        seen: list = []
        handles = [
            nn.modules.module.register_module_forward_pre_hook(lambda m, a, s=seen: s.append("pre")),
            nn.modules.module.register_module_forward_hook(lambda m, a, o, s=seen: s.append("forward")),
            nn.modules.module.register_module_full_backward_hook(lambda m, gi, go, s=seen: s.append("backward")),
        ]
        try:
            module(torch.randn(5, N, requires_grad=True)).sum().backward()
        finally:
            for handle in handles:
                handle.remove()
        outcomes.append(seen)
    assert outcomes[0] == outcomes[1] == ["pre", "forward", "backward"]


# ------------------------------------------------------------------------ what is saved, how long, and who may touch it


class Bytes:
    """Saved tensors as pickled bytes: nothing of the tensor itself is kept."""

    def __init__(self) -> None:
        self.packed, self.unpacked = [], 0

    def pack(self, t: Tensor) -> bytes:
        self.packed.append((tuple(t.shape), t.dtype))
        return pickle.dumps(t.detach().clone(memory_format=torch.preserve_format))

    def unpack(self, data: bytes) -> Tensor:
        self.unpacked += 1
        return pickle.loads(data)


LAYOUTS = {
    "contiguous": lambda t: t * 2,
    "transposed": lambda t: (t * 2).transpose(0, 1),
    "row-strided": lambda t: torch.cat((t, t), -1)[..., :N],
    "every other": lambda t: (t * 2)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_saved_goes_through_the_hooks(layout: str, both, place) -> None:
    """Each saved tensor is packed once and unpacked once, and the node keeps neither x nor its memory besides."""
    source = torch.randn(6, 4, N, device=place.device)
    for module in both():
        module.to(place.device)
        x = LAYOUTS[layout](leaf(source))  # no leaf, which its AccumulateGrad node would keep
        dy = torch.randn(x.shape, device=place.device)
        expected = torch.autograd.grad(module(x), [x, *module.parameters()], dy, retain_graph=True)
        hooks = Bytes()
        with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
            y = module(x)
        assert (tuple(x.shape), x.dtype) in hooks.packed and hooks.unpacked == 0
        got = torch.autograd.grad(y, [x, *module.parameters()], dy)
        assert hooks.unpacked == len(hooks.packed)
        for a, e in zip(got, expected, strict=True):
            assert_same_bits(a, e)


@pytest.fixture
def no_collector():
    """Memory must go by reference counts alone: a cycle would hold activations until the collector comes."""
    gc.disable()
    yield
    gc.enable()


def _alive(x: Tensor) -> Callable[[], bool]:
    tensor = weakref.ref(x)
    return lambda: tensor() is not None


@pytest.mark.usefixtures("no_collector")
def test_with_hooks_that_drop_it_nothing_keeps_the_input(both, place) -> None:
    for module in both():
        module.to(place.device)
        x = leaf(torch.randn(6, N, device=place.device)).tanh().clone()  # clone saves nothing
        alive, hooks = _alive(x), Bytes()
        with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
            y = module(x)
        del x
        assert not alive(), f"{type(module)}: something beside the hooks holds the input"
        y.backward(torch.randn_like(y))
        assert module.weight.grad is not None


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("way", ["backward", "backward with the graph kept", "output dropped", "no_grad", "detached"])
def test_when_the_input_is_released(way: str, both, place) -> None:
    """By backward, or with the output; not before; and never kept where no gradient will be asked for."""
    outcomes = []
    for module in both():
        module.to(place.device)
        x = leaf(torch.randn(6, N, device=place.device)).clone()
        alive = _alive(x)
        if way == "no_grad":
            with torch.no_grad():
                y = module(x)
            del x
            outcomes.append([alive()])
            continue
        y = module(x)
        del x
        stages = [alive()]
        if way == "backward":
            y.backward(torch.ones_like(y))
        elif way == "backward with the graph kept":
            y.backward(torch.ones_like(y), retain_graph=True)
            stages.append(alive())
            y.backward(torch.ones_like(y))
        elif way == "output dropped":
            del y
        else:
            y = y.detach()
        outcomes.append([*stages, alive()])
    expected = {"no_grad": [False], "backward with the graph kept": [True, True, False]}.get(way, [True, False])
    assert outcomes == [expected, expected]


@pytest.mark.usefixtures("no_collector")
def test_higher_derivatives_leave_no_cycle() -> None:
    """A graph of the graph, then dropped. (On the reference: it is autograd's wrapper that is asked here.)"""
    for cls in (fused_norm.LayerNorm, fused_norm.RMSNorm):
        with fused_norm.use_backend("reference"):
            module, start = cls(N), leaf(torch.randn(6, N))
            x = start.clone()
            alive = _alive(x)
            (dx,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
            torch.autograd.grad(dx.square().sum(), start)
            del x, dx
        assert not alive()


@pytest.mark.parametrize("op", OPS)
def test_one_row_in_a_view_of_a_larger_tensor_frees_the_rest(op: str, place) -> None:
    """Autograd saves the view that it was given: no more than torch's does, and no copy that nobody counts."""
    big = leaf(torch.randn(64, N, device=place.device)).clone()
    packed: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.numel()) or t, lambda t: t):
        call(op, FF, big[:2], (N,), torch.ones(N, device=place.device))
    assert max(packed) <= 2 * N


def test_save_on_cpu(both, place) -> None:
    x, dy = (t.to(place.device) for t in _data(5))
    for module in both():
        module.to(place.device)
        expected = _pass(module, x, dy)
        with torch.autograd.graph.save_on_cpu():
            got = _pass(module, x, dy)
        for a, e in zip(got, expected, strict=True):
            assert_same_bits(a, e)


def test_saved_tensors_may_be_forbidden_hooks(both) -> None:
    for module in both():
        with torch.autograd.graph.disable_saved_tensors_hooks("none of these here"):
            module(torch.randn(5, N)).sum().backward()
            with (
                pytest.raises(RuntimeError, match="none of these here"),
                torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
            ):
                module(torch.randn(5, N))


def test_inference_mode_and_its_tensors(both, place) -> None:
    theirs, ours = (m.to(place.device) for m in both())
    x = torch.randn(5, N, device=place.device)
    with torch.inference_mode():
        y, other = ours(x), theirs(x)
        assert y.is_inference() and other.is_inference() and not y.requires_grad
        _close(y.clone(), other.clone())
        made_inside = x.clone()
        _close(ours(made_inside).clone(), other.clone())
    with torch.no_grad():
        _close(ours(made_inside), theirs(made_inside))
    if isinstance(theirs, nn.LayerNorm):  # torch's rms_norm on a CPU saves products of x, and not x itself
        errors = [exception_of(m, made_inside) for m in (theirs, ours)]
        assert [type(e) for e in errors] == [RuntimeError] * 2
        assert all("Inference tensors cannot be saved for backward" in str(e) for e in errors)
    # Parameters that an inference block updates afterwards are caught by autograd in both.
    outcomes = []
    for module in (theirs, ours):
        y = module(x)
        with torch.inference_mode():
            outcomes.append(type(exception_of(module.weight.data.add_, 1)))
        y.backward(torch.ones_like(y))
    assert outcomes[0] is outcomes[1]


UPDATES = {
    "copy_": lambda p: p.copy_(torch.ones(N)),
    "add_": lambda p: p.add_(1),
    "fill_": lambda p: nn.init.zeros_(p),
    "optimizer": lambda p: torch.optim.SGD([p], lr=0.1).step(),
    "load_state_dict": None,
}


@pytest.mark.parametrize("update", UPDATES)
def test_an_update_between_forward_and_backward_is_caught(update: str, both, place) -> None:
    errors = []
    for module in both():
        module.to(place.device)
        module.weight.grad = torch.ones(N, device=place.device)
        y = module(leaf(torch.randn(5, N, device=place.device)))
        if update == "load_state_dict":
            module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()})
        else:
            with torch.no_grad():
                UPDATES[update](module.weight)
        errors.append(exception_of(y.backward, torch.ones_like(y)))
    assert [type(e) for e in errors] == [RuntimeError] * 2
    assert all("modified by an inplace operation" in str(e) for e in errors)


def test_an_update_through_data_is_not_caught(both) -> None:
    """``.data`` counts no version: torch computes with the new weight, and so do we."""
    x, dy = _data(5)
    outcomes = []
    for module in both():
        leaf_x = leaf(x)
        y = module(leaf_x)
        module.weight.data.mul_(2)
        y.backward(dy)
        outcomes.append([leaf_x.grad, module.weight.grad])
    if isinstance(module, fused_norm.LayerNorm):  # torch's rms_norm on a CPU is several operations
        _close(*outcomes)


def test_an_update_of_the_bias_does_no_harm(place) -> None:
    """Backward does not read the bias. torch's layer_norm saves it all the same, and raises; ours (README) does not."""
    if place.backend == "torch":
        pytest.skip("torch's own function, which saves it")
    x, dy = (torch.randn(5, N, device=place.device) for _ in range(2))
    gradients = []
    for update in (False, True):
        module, leaf_x = fused_norm.LayerNorm(N).to(place.device), leaf(x)
        y = module(leaf_x)
        if update:
            with torch.no_grad():
                module.bias.add_(1)
        y.backward(dy)
        gradients.append([leaf_x.grad, module.weight.grad, module.bias.grad])
    _close(*gradients)
    theirs = nn.LayerNorm(N).to(place.device)
    y = theirs(leaf(x))
    with torch.no_grad():
        theirs.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_rms_norm_of_data_refuses_a_weight_that_changed() -> None:
    """The weight is saved whether or not dx needs it: a refusal where torch's CPU rms_norm has none (README)."""
    for cls in (nn.RMSNorm, fused_norm.RMSNorm):
        module = cls(N)
        y = module(torch.randn(5, N))
        with torch.no_grad():
            module.weight.add_(1)
        if cls is nn.RMSNorm or fused_norm.available_backends()["native"] is not None:  # then it is torch's own
            y.backward(torch.ones_like(y))
            continue
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(torch.ones_like(y))


# ------------------------------------------------------------------------------------------------------ checkpointing


class Block(nn.Module):
    """A norm behind a dropout, whose mask the second forward must draw again."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.up, self.dropout, self.norm = nn.Linear(N, N), nn.Dropout(0.4), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.dropout(self.up(x))).relu()


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "not stopping early": {"use_reentrant": False, "early_stop": False},
}


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_checkpointing_gives_the_same_bits(how: str, both, place) -> None:
    from torch.utils.checkpoint import checkpoint

    x, dy = (t.to(place.device) for t in _data(5))
    for norm in both():
        torch.manual_seed(1)
        model = nn.Sequential(Block(norm), Block(copy.deepcopy(norm))).to(place.device)
        results = []
        for wrapped in (False, True):
            torch.manual_seed(2)
            inner = leaf(x)
            y = inner
            for block in model:
                y = checkpoint(block, y, **CHECKPOINTS[how]) if wrapped else block(y)
            y.backward(dy)
            results.append([y.detach(), inner.grad, *(p.grad for p in model.parameters())])
            model.zero_grad()
        for a, e in zip(*results, strict=True):
            assert_same_bits(a, e)


@pytest.mark.usefixtures("no_collector")
def test_checkpointing_releases_what_is_inside(both, place) -> None:
    from torch.utils.checkpoint import checkpoint

    for module in both():
        inside = []

        def block(t: Tensor, module=module, inside=inside) -> Tensor:
            t = t.clone()
            inside.append(weakref.ref(t))
            return module(t)

        module.to(place.device)
        y = checkpoint(block, leaf(torch.randn(5, N, device=place.device)), use_reentrant=False)
        assert [r() for r in inside] == [None], "the input of the norm is kept after forward"
        y.backward(torch.ones_like(y))
        assert len(inside) == 2


def test_selective_checkpointing(both, place) -> None:
    """A policy sees operators: ours by their own names, and whatever it decides, the bits are the same."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    x, dy = (t.to(place.device) for t in _data(5))
    theirs, ours = both()
    composite = isinstance(theirs, nn.RMSNorm) and place.device == "cpu"
    if composite and place.backend == "torch":
        pytest.skip("torch's rms_norm on a CPU writes over what the policy keeps, which torch refuses")
    for norm in (ours,) if composite else (theirs, ours):
        block = Block(norm).to(place.device).eval()
        expected = _pass(block, x, dy)
        for decision in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE):
            inner = leaf(x)
            y = checkpoint(
                block,
                inner,
                use_reentrant=False,
                context_fn=lambda d=decision: create_selective_checkpoint_contexts(lambda ctx, op, *a, **k: d),
            )
            got = [y.detach(), *torch.autograd.grad(y, [inner, *block.parameters()], dy)]
            for a, e in zip(got, expected, strict=True):
                assert_same_bits(a, e)


# ------------------------------------------------------------------------------------------- training: AMP, optimisers


def _model(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(N, N), norm, nn.ReLU(), copy.deepcopy(norm), nn.Linear(N, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_with_a_gradient_scaler(dtype: torch.dtype, both) -> None:
    """The same scaled and unscaled gradients, and the same step skipped where a gradient is not finite."""
    batches = [torch.randn(6, N) for _ in range(5)]
    outcomes = []
    for norm in both():
        model = _model(norm)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        outcome = []
        for step, x in enumerate(batches):
            optimizer.zero_grad()
            with torch.amp.autocast("cpu", dtype):
                hidden = model[:2](x)
                outcome.append(hidden.dtype)
                loss = model[2:](hidden).float().square().mean()
            if step == 2:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            outcome.append([p.grad.dtype for p in model.parameters()])
            if step != 2:
                outcome.append([p.grad.clone() for p in model.parameters()])
            scaler.unscale_(optimizer)
            before = [p.detach().clone() for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            outcome.append(all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)))
            outcome.append(scaler.get_scale())
            outcome.append([p.detach().clone() for p in model.parameters()])
        outcomes.append(outcome)
    leaves = [torch.utils._pytree.tree_leaves(o) for o in outcomes]
    assert len(leaves[0]) == len(leaves[1])
    assert [t for t in leaves[0] if isinstance(t, bool)] == [False, False, True, False, False]
    for e, a in zip(*leaves, strict=True):
        if isinstance(e, Tensor):
            assert a.dtype == e.dtype
            unit = torch.finfo(dtype).eps
            torch.testing.assert_close(a, e, rtol=8 * unit, atol=8 * unit * max(1e-3, e.abs().max().item()))
        else:
            assert a == e


OPTIMIZERS = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW one by one": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_and_clipping(name: str, both) -> None:
    batches = [torch.randn(6, N) for _ in range(3)]
    outcomes = []
    for norm in both():
        model = _model(norm)
        optimizer = OPTIMIZERS[name](model.parameters())
        outcome = []
        for x in batches:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            outcome.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05, foreach=name.endswith("foreach")))
            outcome += [p.grad.clone() for p in model.parameters()]
            nn.utils.clip_grad_value_(model.parameters(), 0.03)
            optimizer.step()
        outcomes.append(outcome + [p.detach() for p in model.parameters()])
    _close(outcomes[1], outcomes[0], 2e-4)  # Adam divides small gradients by their size


def test_optimizer_step_inside_backward(both) -> None:
    """Each parameter is updated as soon as its gradient is there, while backward is still under way."""
    x, dy = _data(5)
    outcomes = []
    for norm in both():
        model = nn.Sequential(norm, nn.ReLU(), copy.deepcopy(norm))

        def step(p: Tensor) -> None:
            torch.optim.SGD([p], lr=0.1).step()
            p.grad = None

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        for _ in range(2):
            model(x).backward(dy)
        outcomes.append([p.detach() for p in model.parameters()])
    _close(*outcomes)


def test_gradients_accumulate_in_place(both) -> None:
    """Over micro-batches ``.grad`` stays one tensor, and a gradient handed out is nobody else's memory."""
    x, dy = _data(5)
    outcomes = []
    for module in both():
        inner = leaf(x)
        y = module(inner)
        y.backward(dy, retain_graph=True)
        first = [t.grad for t in (inner, *module.parameters())]
        y.backward(dy)
        assert all(a is t.grad for a, t in zip(first, (inner, *module.parameters()), strict=True))
        assert len({t.untyped_storage().data_ptr() for t in (dy, inner, *first)}) == len(first) + 2
        outcomes.append(first)
    _close(*outcomes)


def test_averaged_model(both) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    outcomes = []
    x, dy = _data(5)
    for norm in both():
        module = copy.deepcopy(norm)
        averaged = [AveragedModel(module), AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))]
        torch.manual_seed(3)
        for _ in range(3):
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(torch.randn_like(p))
            for average in averaged:
                average.update_parameters(module)
        assert all(type(average.module) is type(norm) for average in averaged)
        outcomes.append([_pass(average.module, x, dy) for average in averaged])
        for average in averaged:
            assert list(average.state_dict())[1:] == [f"module.{k}" for k in norm.state_dict()]
    _close(*outcomes)


def test_data_parallel_without_devices(both) -> None:
    """Without a GPU, DataParallel is the module itself."""
    if torch.accelerator.is_available():
        pytest.skip("DataParallel would move the module to the accelerator")
    x, dy = _data(6)
    theirs, ours = (nn.DataParallel(m) for m in both())
    _close(_pass(ours, x, dy), _pass(theirs, x, dy))
    assert list(ours.state_dict()) == list(theirs.state_dict())


# ----------------------------------------------------------------------------------- two processes: DDP, FSDP2, DTensor


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[Outcomes]:
    """What each of two processes found in the checks of worker_distributed.py: they are started once for all."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch is built without gloo")
    folder = tmp_path_factory.mktemp("distributed")
    return run_worker("worker_distributed.py", folder, str(folder / "store"), processes=worker_distributed.WORLD)


@pytest.mark.parametrize("check", [c.__name__ for c in worker_distributed.CHECKS])
def test_two_processes(check: str, together: list[Outcomes]) -> None:
    assert_passed(check, together)
