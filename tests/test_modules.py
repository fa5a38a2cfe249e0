"""fused_norm.LayerNorm and RMSNorm against the torch modules they subclass."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, assert_same_bits
from torch import nn

import fused_norm

PAIRS = {"LayerNorm": (fused_norm.LayerNorm, nn.LayerNorm), "RMSNorm": (fused_norm.RMSNorm, nn.RMSNorm)}
pairs = pytest.mark.parametrize("ours, theirs", PAIRS.values(), ids=PAIRS)

#: Constructor calls; bias=False is nn.LayerNorm's alone.
CALLS = {
    "int": ((24,), {}),
    "tuple": (((4, 6),), {}),
    "list": (([4, 6],), {}),
    "eps": ((24,), {"eps": 0.25}),
    "positional": ((24, 0.25, False), {}),
    "no affine": ((24,), {"elementwise_affine": False}),
    "no bias": ((24,), {"bias": False}),
    "dtype": ((24,), {"dtype": torch.float64}),
    "meta": ((24,), {"device": "meta"}),
    "eps and dtype": (((4, 6),), {"eps": 1e-3, "dtype": torch.bfloat16}),
}


def _calls(theirs: type) -> list:
    accepted = inspect.signature(theirs.__init__).parameters
    return [(name, args, kwargs) for name, (args, kwargs) in CALLS.items() if set(kwargs) <= set(accepted)]


CONSTRUCTIONS = [
    pytest.param(ours, theirs, args, kwargs, id=f"{pair}-{name}")
    for pair, (ours, theirs) in PAIRS.items()
    for name, args, kwargs in _calls(theirs)
]


def _like(ours: type, module: nn.Module, *args, **kwargs) -> nn.Module:
    """Ours with ``module``'s state."""
    made = ours(*args, **kwargs)
    made.load_state_dict(module.state_dict())
    return made


@pairs
def test_class(ours: type, theirs: type) -> None:
    """A subclass, with the torch name in its own: Hugging Face initialises and spares from weight decay by it."""
    assert issubclass(ours, theirs) and ours is not theirs
    assert theirs.__name__ in ours.__name__
    our_parameters, their_parameters = (inspect.signature(cls).parameters for cls in (ours, theirs))
    plain = [(p.name, p.default) for p in our_parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert plain == [(p.name, p.default) for p in their_parameters.values()]
    assert all(p.default in (0.0, False) for p in our_parameters.values() if p.kind is p.KEYWORD_ONLY)


@pytest.mark.parametrize("ours, theirs, args, kwargs", CONSTRUCTIONS)
def test_construction(ours: type, theirs: type, args, kwargs) -> None:
    a, b = ours(*args, **kwargs), theirs(*args, **kwargs)
    assert (a.normalized_shape, a.eps, a.elementwise_affine) == (b.normalized_shape, b.eps, b.elementwise_affine)
    assert repr(a).replace(type(a).__name__, type(b).__name__, 1) == repr(b)
    assert a.extra_repr() == b.extra_repr()
    assert list(a._parameters) == list(b._parameters)
    assert list(a.state_dict()) == list(b.state_dict())
    for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert (
            name == other
            and p.requires_grad == q.requires_grad
            and (p.shape, p.dtype, p.device) == (q.shape, q.dtype, q.device)
        )
        if p.device.type != "meta":
            assert_same_bits(p.detach(), q.detach())
    for name in ("weight", "bias"):
        assert (getattr(a, name, "absent") is None) == (getattr(b, name, "absent") is None)


@pytest.mark.parametrize("ours, theirs, args, kwargs", [c for c in CONSTRUCTIONS if "meta" not in c.id])
def test_forward_and_gradients(ours: type, theirs: type, args, kwargs, place) -> None:
    b = theirs(*args, **kwargs).to(place.device)
    with torch.no_grad():
        for p in b.parameters():
            p.copy_(torch.randn(p.shape))
    a = _like(ours, b, *args, **kwargs).to(place.device)
    dtype = kwargs.get("dtype", torch.float32)
    x = torch.randn(5, 4, 6, device=place.device).to(dtype)
    x = x if len(b.normalized_shape) == 2 else x.flatten(1)
    dy = torch.randn(x.shape).to(x)
    results = []
    for module in (a, b):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append((y, *torch.autograd.grad(y, [leaf, *module.parameters()], dy)))
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for u, v in zip(*results, strict=True):
        torch.testing.assert_close(u, v, **tolerance)


@pairs
def test_forward_reaches_our_kernels(ours: type, theirs: type, reference_calls) -> None:
    module = ours(24)
    with fused_norm.use_backend("reference"):
        module(torch.randn(5, 24)).sum().backward()
    assert len(reference_calls.forward) == len(reference_calls.backward) == 1
    forward = reference_calls.forward[0]
    expected = torch.finfo(torch.float32).eps if module.eps is None else module.eps
    assert forward.eps == expected and forward.weight.data_ptr() == module.weight.data_ptr()


@pairs
def test_bad_input_raises_as_torch(ours: type, theirs: type) -> None:
    for x in (torch.randn(5, 23), torch.ones(5, 24, dtype=torch.int64), torch.tensor(1.0)):
        with pytest.raises(Exception) as expected:
            theirs(24)(x)
        with pytest.raises(type(expected.value)) as caught:
            ours(24)(x)
        assert type(caught.value) is type(expected.value)


@pairs
def test_state_dict_both_ways(ours: type, theirs: type) -> None:
    a, b = ours((4, 6)), theirs((4, 6))
    for p in (*a.parameters(), *b.parameters()):
        nn.init.normal_(p)
    b.load_state_dict(a.state_dict(), strict=True)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach())
    for p in b.parameters():
        nn.init.normal_(p)
    a.load_state_dict(b.state_dict(), strict=True)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach())


@pairs
def test_reset_parameters(ours: type, theirs: type) -> None:
    a = ours(24)
    for p in a.parameters():
        nn.init.normal_(p)
    a.reset_parameters()
    for p, q in zip(a.parameters(), theirs(24).parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach())


def _deepcopied(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)


def _pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pairs
@pytest.mark.parametrize("copied", [_deepcopied, _pickled, _saved])
def test_copies(ours: type, theirs: type, copied) -> None:
    module = ours(24, eps=0.25)
    for p in module.parameters():
        nn.init.normal_(p)
    x = torch.randn(5, 24)
    expected = module(x)
    clone = copied(module)
    assert type(clone) is type(module) and clone.eps == 0.25
    assert all(p is not q for p, q in zip(module.parameters(), clone.parameters(), strict=True))
    assert_same_bits(clone(x).detach(), expected.detach())
    with torch.no_grad():
        clone.weight.zero_()
    assert_same_bits(module(x).detach(), expected.detach())


@pairs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conversion(ours: type, theirs: type, dtype: torch.dtype) -> None:
    """``.half()``, ``.to(dtype)``: parameters, output and gradients in the new dtype."""
    a, b = ours(24).to(dtype), theirs(24).to(dtype)
    x = torch.randn(5, 24).to(dtype)
    ya, yb = a(x), b(x)
    assert ya.dtype == dtype
    torch.testing.assert_close(ya, yb)
    ya.backward(torch.randn(5, 24).to(dtype))
    assert all(p.dtype == p.grad.dtype == dtype for p in a.parameters())
    assert ours(24).half().weight.dtype == torch.float16


@pairs
def test_fp32_module_takes_low_precision_input(ours: type, theirs: type, device: str) -> None:
    module = ours(24).to(device)
    x = torch.randn(5, 24, device=device).bfloat16()
    y = module(x)
    assert y.dtype == torch.bfloat16
    y.backward(torch.randn_like(y))
    assert module.weight.grad.dtype == torch.float32


@pairs
def test_meta_then_to_empty(ours: type, theirs: type) -> None:
    module = ours(24, device="meta")
    assert module(torch.empty(5, 24, device="meta")).shape == (5, 24)
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    x = torch.randn(5, 24)
    torch.testing.assert_close(module(x), theirs(24)(x))
    with torch.device("meta"):
        assert ours(24).weight.device.type == "meta"


@pairs
def test_a_subclass_may_extend_it(ours: type, theirs: type) -> None:
    class Scaled(ours):
        def __init__(self, n: int, scale: float) -> None:
            super().__init__(n)
            self.scale = scale

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * self.scale

    x = torch.randn(5, 24)
    torch.testing.assert_close(Scaled(24, 3.0)(x), theirs(24)(x) * 3)


class Net(nn.Module):
    def __init__(self, layer_norm: type, rms_norm: type) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.norm1 = layer_norm(32)
        self.up = nn.Linear(32, 64)
        self.norm2 = rms_norm((64,))
        self.down = nn.Linear(64, 32, bias=False)
        self.norm3 = layer_norm(32, bias=False)
        self.head = nn.Linear(32, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.embed(tokens))
        x = x + self.down(torch.relu(self.norm2(self.up(x))))
        return self.head(self.norm3(x).mean(1))


def test_three_steps_of_training_equal_torchs(device: str) -> None:
    """Same start, same data: parameters agree to rounding after three steps."""
    torch.manual_seed(0)
    theirs = Net(nn.LayerNorm, nn.RMSNorm).to(device)
    ours = Net(fused_norm.LayerNorm, fused_norm.RMSNorm).to(device)
    ours.load_state_dict(theirs.state_dict())
    start = {k: v.clone() for k, v in theirs.state_dict().items()}
    data = [(torch.randint(50, (8, 12), device=device), torch.randint(10, (8,), device=device)) for _ in range(3)]
    losses = []
    for model in (ours, theirs):
        # SGD, not Adam: the first steps of Adam divide by the gradient's size and so blow rounding up.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        losses.append([])
        for tokens, labels in data:
            loss = F.cross_entropy(model(tokens), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, value in theirs.state_dict().items():
        moved = (value - start[name]).norm()
        assert moved > 0, name
        assert (ours.state_dict()[name] - value).norm() <= 1e-4 * moved, name
