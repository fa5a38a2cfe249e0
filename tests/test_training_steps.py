"""What people do with higher derivatives, on a small transformer: the same numbers with torch's norms and with ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

import fused_norm

WIDTH, TOKENS, BATCH = 12, 5, 4


class Block(nn.Module):
    """Pre-norm attention and an MLP; one norm of each kind, so that both are in every derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH, eps=1e-5)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = self.q(y), self.k(y), self.v(y)
        # Written out: torch's fused attention has no second derivative.
        x = x + self.out(torch.softmax(q @ k.transpose(-1, -2) / WIDTH**0.5, -1) @ v)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)).mean(-2)).squeeze(-1)


@pytest.fixture(params=["native", "reference"])
def models(request: pytest.FixtureRequest, device: str) -> Iterator[tuple[nn.Module, nn.Module, str]]:
    """torch's model and the same one patched, in fp64."""
    if fused_norm.available_backends()[request.param] is not None:
        pytest.skip(fused_norm.available_backends()[request.param])
    stock = Transformer().double().to(device)
    for p in stock.parameters():  # so that weights are not all one and biases zero
        p.data += 0.1 * torch.randn_like(p)
    patched = copy.deepcopy(stock)
    assert len(fused_norm.patch(patched).swapped) == 5
    with fused_norm.use_backend(request.param):
        yield stock, patched, device


def _data(device: str, *batch: int) -> Tensor:
    return torch.randn(*batch, TOKENS, WIDTH, dtype=torch.float64, device=device)


def _same(models: tuple[nn.Module, nn.Module, str], step: Callable[[nn.Module], object]) -> None:
    stock, patched, _ = models
    expected, result = (torch.utils._pytree.tree_leaves(step(m)) for m in (stock, patched))
    assert len(result) == len(expected) > 0 and any(e.abs().max() > 1e-6 for e in expected)
    for a, e in zip(result, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-10)


def test_gradient_penalty(models) -> None:
    """WGAN-GP (Gulrajani et al., 2017): the critic's gradient at points between real and fake has norm 1."""
    device = models[2]
    real, fake = _data(device, BATCH), _data(device, BATCH)
    mix = torch.rand(BATCH, 1, 1, dtype=torch.float64, device=device)

    def step(critic: nn.Module) -> list[Tensor]:
        critic.zero_grad()
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        (dx,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        penalty = (dx.flatten(1).norm(dim=1) - 1).square().mean()
        (critic(fake).mean() - critic(real).mean() + 10 * penalty).backward()
        return [p.grad for p in critic.parameters() if p.grad is not None]

    _same(models, step)


def test_maml_inner_step(models) -> None:
    """MAML (Finn et al., 2017): the gradient, through two steps of gradient descent, of the loss after them."""
    device = models[2]
    support, query = _data(device, BATCH), _data(device, BATCH)
    labels = torch.randn(2, BATCH, dtype=torch.float64, device=device)

    def step(model: nn.Module) -> tuple[Tensor, ...]:
        start = dict(model.named_parameters())
        fast = start
        for _ in range(2):
            loss = F.mse_loss(functional_call(model, fast, (support,)), labels[0])
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {k: p - 0.1 * g for (k, p), g in zip(fast.items(), grads, strict=True)}
        return torch.autograd.grad(F.mse_loss(functional_call(model, fast, (query,)), labels[1]), list(start.values()))

    _same(models, step)


def test_per_sample_gradient_clipping(models) -> None:
    """DP-SGD (Abadi et al., 2016): each example's gradient over all parameters clipped, then averaged."""
    device = models[2]
    x, labels = _data(device, BATCH), torch.randn(BATCH, dtype=torch.float64, device=device)

    def step(model: nn.Module) -> dict[str, Tensor]:
        params = {k: p.detach() for k, p in model.named_parameters()}

        def loss(params, x, label):
            return F.mse_loss(functional_call(model, params, (x.unsqueeze(0),)).squeeze(0), label)

        each = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, labels)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in each.values()]).norm(dim=0)
        scale = (0.5 / norms).clamp(max=1)
        assert (scale < 1).any()
        return {k: torch.einsum("b,b...->...", scale, g) / BATCH for k, g in each.items()}

    _same(models, step)


def test_lbfgs(models) -> None:
    device = models[2]
    x, labels = _data(device, BATCH), torch.randn(BATCH, dtype=torch.float64, device=device)

    def step(model: nn.Module) -> list[Tensor]:
        model = copy.deepcopy(model)
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=6, line_search_fn="strong_wolfe")
        losses = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), labels)
            loss.backward()
            losses.append(loss.detach())
            return loss

        optimizer.step(closure)
        assert losses[-1] < 0.9 * losses[0]
        return [torch.stack(losses), *(p.detach() for p in model.parameters())]

    _same(models, step)


def test_hessian_vector_product(models) -> None:
    """Reverse over reverse on both models; on ours forward over reverse and reverse over forward give the same.

    (Reverse over forward of torch's own layer_norm is wrong.)
    """
    stock, patched, device = models
    x, labels = _data(device, BATCH), torch.randn(BATCH, dtype=torch.float64, device=device)
    names, start = zip(*((k, p.detach()) for k, p in stock.named_parameters()), strict=True)
    direction = tuple(torch.randn_like(p) for p in start)

    def loss(model: nn.Module) -> Callable[..., Tensor]:
        # F.mse_loss written out: forward over reverse of torch's own fails ("ZeroTensors are immutable").
        return lambda *params: (
            (functional_call(model, dict(zip(names, params, strict=True)), (x,)) - labels).square().mean()
        )

    def reverse_over_reverse(model: nn.Module) -> tuple[Tensor, ...]:
        leaves = [p.clone().requires_grad_() for p in start]
        grads = torch.autograd.grad(loss(model)(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(grads, leaves, direction)

    _same(models, reverse_over_reverse)
    expected = reverse_over_reverse(stock)
    everything = tuple(range(len(start)))
    forward_over_reverse = jvp(grad(loss(patched), everything), start, direction)[1]
    slope = lambda *params: jvp(loss(patched), params, direction)[1]  # noqa: E731
    reverse_over_forward = vjp(slope, *start)[1](torch.ones((), dtype=torch.float64, device=device))
    for result in (forward_over_reverse, reverse_over_forward):
        for a, e in zip(result, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-10)
