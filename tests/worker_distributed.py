"""What two processes check together, for tests/test_life.py: DDP, FSDP2 and DTensor on gloo.

``python worker_distributed.py RANK STORE OUTCOMES`` runs every check and writes {name: None or a traceback} as JSON.
A patched model is compared with the same model unpatched; one start of the processes, which is slow, serves all.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import fused_norm
import fused_norm.functional as FF

WORLD = 2


class Net(nn.Module):
    """Norms of both kinds, and a branch that one of the processes may leave unused."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.branch = nn.RMSNorm(16)
        self.last = nn.Sequential(nn.RMSNorm(16, eps=1e-5), nn.Linear(16, 8), nn.LayerNorm(8, bias=False))

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        x = self.norm(self.first(x)).relu()
        if branch:
            x = x + self.branch(x)
        return self.last(x)


def _pair() -> tuple[nn.Module, nn.Module]:
    """(unpatched, patched), with the same parameters in every process."""
    torch.manual_seed(0)
    stock = Net()
    with torch.no_grad():
        for p in stock.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    patched = copy.deepcopy(stock)
    assert len(fused_norm.patch(patched).swapped) == 4
    return stock, patched


def _full(t: Tensor) -> Tensor:
    """All of a tensor of which each process may hold a part."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def _train(model: nn.Module, rank: int, unused: bool = False, static: bool = False) -> dict[str, Tensor]:
    """Three steps on data of this process's own: the loss and gradients of each, and the parameters at the end."""
    # SGD, not Adam, whose first steps divide by the gradient's size and so blow rounding up.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = torch.Generator().manual_seed(1 + rank)
    seen = {}
    for step in range(3):
        x, target = torch.randn(6, 12, generator=data), torch.randn(6, 8, generator=data)
        if unused:
            loss = (model(x, False if static else (rank + step) % 2 == 0) - target).square().mean()
        else:
            loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        seen[f"loss {step}"] = loss.detach()
        for name, p in model.named_parameters():
            if p.grad is not None:
                seen[f"{name}.grad {step}"] = _full(p.grad).detach().clone()
        optimizer.step()
    return seen | {name: _full(p).detach().clone() for name, p in model.named_parameters()}


def _assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def _same_training(wrap: Callable[[nn.Module], nn.Module], rank: int, tolerance: float = 2e-5, **how: bool) -> None:
    """Wrapped the same way, a patched model trains as the unpatched one: to rounding by our kernels, to the bit by
    torch's."""
    stock, patched = _pair()
    again = copy.deepcopy(patched)
    theirs = _train(wrap(stock), rank, **how)
    _assert_equal(_train(wrap(patched), rank, **how), theirs, rtol=tolerance, atol=tolerance)
    with fused_norm.use_backend("torch"):
        _assert_equal(_train(wrap(again), rank, **how), theirs, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------- DDP


def ddp(rank: int, mesh: DeviceMesh) -> None:
    _same_training(DistributedDataParallel, rank)
    # Every process holds the same parameters afterwards, as averaged gradients make them.
    model = DistributedDataParallel(_pair()[1])
    for name, mine in _train(model, rank).items():
        if "loss" not in name:
            first = mine.clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, mine), name


def ddp_gradient_as_bucket_view(rank: int, mesh: DeviceMesh) -> None:
    _same_training(lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True), rank)


def ddp_find_unused_parameters(rank: int, mesh: DeviceMesh) -> None:
    _same_training(lambda m: DistributedDataParallel(m, find_unused_parameters=True), rank, unused=True)


def ddp_static_graph(rank: int, mesh: DeviceMesh) -> None:
    _same_training(lambda m: DistributedDataParallel(m, static_graph=True), rank)
    _same_training(lambda m: DistributedDataParallel(m, static_graph=True), rank, unused=True, static=True)


def ddp_checkpointed(rank: int, mesh: DeviceMesh) -> None:
    """Reentrant checkpointing runs backward inside backward, which DDP takes with a static graph alone."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, net: nn.Module, reentrant: bool) -> None:
            super().__init__()
            self.net, self.reentrant = net, reentrant

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x.requires_grad_(), use_reentrant=self.reentrant)

    for reentrant in (False, True):
        _same_training(lambda m, r=reentrant: DistributedDataParallel(Checkpointed(m, r), static_graph=True), rank)


def ddp_patched_after_wrapping(rank: int, mesh: DeviceMesh) -> None:
    """patch swaps classes and keeps the Parameters, whose hooks are DDP's: the order does not matter."""
    stock, patched = _pair()
    late = DistributedDataParallel(copy.deepcopy(stock))
    assert len(fused_norm.patch(late).swapped) == 4
    ours = _train(late, rank)
    _assert_equal(ours, _train(DistributedDataParallel(patched), rank), rtol=0, atol=0)
    _assert_equal(ours, _train(DistributedDataParallel(stock), rank), rtol=2e-5, atol=2e-5)


# -------------------------------------------------------------------------------------------------------------- FSDP2


def _sharded(model: nn.Module, mesh: DeviceMesh, **options) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for module in (model.norm, model.branch, model.last):
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp2(rank: int, mesh: DeviceMesh) -> None:
    _same_training(lambda m: _sharded(m, mesh), rank)
    _same_training(lambda m: _sharded(m, mesh, reshard_after_forward=False), rank)


def fsdp2_mixed_precision(rank: int, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    _same_training(lambda m: _sharded(m, mesh, mp_policy=policy), rank, tolerance=3e-2)


def fsdp2_runs_our_kernels(rank: int, mesh: DeviceMesh) -> None:
    """Inside forward parameters are whole and plain: it is not torch's function that runs."""
    model, calls, original = _sharded(_pair()[1], mesh), [], fused_norm.reference.norm_forward
    fused_norm.reference.norm_forward = lambda *args: calls.append(1) or original(*args)
    try:
        with fused_norm.use_backend("reference"):
            model(torch.randn(6, 12)).sum().backward()
    finally:
        fused_norm.reference.norm_forward = original
    assert len(calls) == 4


def fsdp2_state_dict_and_unpatch(rank: int, mesh: DeviceMesh) -> None:
    stock, patched = (_sharded(m, mesh) for m in _pair())
    for (name, theirs), (other, ours) in zip(stock.state_dict().items(), patched.state_dict().items(), strict=True):
        assert name == other and type(ours) is type(theirs) and ours.placements == theirs.placements
        assert torch.equal(_full(ours), _full(theirs)), name
    patched.load_state_dict(stock.state_dict(), strict=True)
    # fully_shard changes the class, so unpatch leaves these alone rather than take FSDP off them.
    assert set(fused_norm.unpatch(patched)) <= {"last.0", "last.2"}
    patched(torch.randn(6, 12)).sum().backward()


# ------------------------------------------------------------------------------------------------------------- DTensor


def dtensor(rank: int, mesh: DeviceMesh) -> None:
    """A DTensor goes to torch's own function: same bits and placements, or the same error."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    torch.manual_seed(3)
    x, w, b, dy = torch.randn(4, 6, 8), torch.randn(8), torch.randn(8), torch.randn(4, 6, 8)

    def results(op: str, namespace, placement) -> list[Tensor]:
        leaves = [distribute_tensor(x, mesh, [placement])]
        leaves += [distribute_tensor(p, mesh, [Replicate()]) for p in ((w, b) if op == "layer_norm" else (w,))]
        leaves = [t.requires_grad_() for t in leaves]
        y = getattr(namespace, op)(leaves[0], (8,), *leaves[1:])
        return [y, *torch.autograd.grad(y, leaves, distribute_tensor(dy, mesh, y.placements))]

    compared = 0
    for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
        for op in ("layer_norm", "rms_norm"):
            try:
                theirs = results(op, F, placement)
            except RuntimeError as error:  # rms_norm of rows that are themselves in parts
                with contextlib.suppress(type(error)):
                    results(op, FF, placement)
                    raise AssertionError(f"torch refuses {op} of {placement}: {error}") from None
                continue
            for a, e in zip(results(op, FF, placement), theirs, strict=True):
                assert type(a) is type(e) is DTensor and a.placements == e.placements
                assert torch.equal(_full(a), _full(e)), (op, placement)
            compared += 1
    assert compared >= 6


def dtensor_parameters(rank: int, mesh: DeviceMesh) -> None:
    """A DTensor among plain tensors: torch's result or torch's error."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    w = distribute_tensor(torch.ones(8), mesh, [Replicate()])
    outcomes = []
    for namespace in (FF, F):
        try:
            outcomes.append(type(namespace.layer_norm(torch.randn(4, 8), (8,), w)))
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] is outcomes[1], outcomes


def sequence_parallel(rank: int, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    torch.manual_seed(4)
    x = torch.randn(2, 6, 8)
    for theirs, ours in ((nn.LayerNorm(8), fused_norm.LayerNorm(8)), (nn.RMSNorm(8), fused_norm.RMSNorm(8))):
        results = []
        for module in (theirs, ours):
            module = parallelize_module(nn.Sequential(module), mesh, {"0": SequenceParallel()})
            leaf = x[:, rank * 3 : rank * 3 + 3].clone().requires_grad_()
            y = _full(module(leaf))
            y.sin().sum().backward()
            results.append([y, leaf.grad, *(_full(p.grad) for p in module.parameters())])
        for a, e in zip(*results, strict=True):
            assert torch.equal(a, e)


CHECKS = (
    ddp,
    ddp_gradient_as_bucket_view,
    ddp_find_unused_parameters,
    ddp_static_graph,
    ddp_checkpointed,
    ddp_patched_after_wrapping,
    fsdp2,
    fsdp2_mixed_precision,
    fsdp2_runs_our_kernels,
    fsdp2_state_dict_and_unpatch,
    dtensor,
    dtensor_parameters,
    sequence_parallel,
)


@contextlib.contextmanager
def _group(rank: int, store: str) -> Iterator[DeviceMesh]:
    torch.set_num_threads(1)
    # A file in place of a port: nobody else can take it.
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        yield init_device_mesh("cpu", (WORLD,))
    finally:
        dist.destroy_process_group()


def main() -> None:
    rank, store, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    warnings.simplefilter("ignore")
    outcomes: dict[str, str | None] = {}
    with _group(rank, store) as mesh:
        for check in CHECKS:
            try:
                check(rank, mesh)
                outcomes[check.__name__] = None
            except Exception:
                outcomes[check.__name__] = traceback.format_exc()
            with open(path, "w") as file:  # after each check: one that hangs shows as the first that is missing
                json.dump(outcomes, file)


if __name__ == "__main__":
    main()
