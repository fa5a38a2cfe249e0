"""What the harness is made of: an operation with all that belongs to it, one case's inputs, and a provider."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .shapes import Shape, Shapes, model_names

#: Takes one case's tensors in the order of `Inputs.tensors`, gives the output, or several: None for one that it need
#: not give, since no gradient reaches it.
Call = Callable[..., Tensor | tuple[Tensor | None, ...]]

#: A gradient for the output, or one for each, None where none reaches it.
Upstream = Tensor | tuple[Tensor | None, ...]

PASSES = ("forward", "backward", "forward+backward", "forward-nograd")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

#: What a shape's numbers are: rows, columns (or classes), and hidden features before a classifier.
DIMS = ("m", "n", "h")

#: The provider that every ratio is taken to.
BASELINE = "torch"

#: The truth is made, and answers are judged, in blocks of rows with about this many elements: it takes several fp64
#: tensors of a block's size. On a GPU, blocks must be large for its matrix products to be worth it.
BLOCK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}


def row_blocks(m: int, n: int, device: torch.device) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS[device.type] // n)
    for start in range(0, m, step):
        yield slice(start, min(m, start + step))


@dataclass(frozen=True)
class Inputs:
    """One case's tensors, by name, in the order in which a call takes them. ``leaves`` names those that require grad.

    ``upstream`` is the random gradient with which answers are judged; ``timed_upstream`` the one of timed calls, or
    None for what ``loss.backward()`` takes: the number 1, of which implementations may make use.
    """

    tensors: dict[str, Tensor | None]
    leaves: tuple[str, ...]
    upstream: Upstream
    timed_upstream: Upstream | None = None

    @property
    def args(self) -> tuple[Tensor | None, ...]:
        return tuple(self.tensors.values())

    @property
    def leaf_tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.tensors[name] for name in self.leaves)

    @property
    def x(self) -> Tensor:
        return self.tensors["x"]

    def without_sharing(self, names: tuple[str, ...]) -> Inputs:
        """The same with copies of the tensors named; as a model's output, no leaf is among them."""
        copies = {name: self.tensors[name].detach().requires_grad_(name in self.leaves).clone() for name in names}
        return replace(self, tensors={**self.tensors, **copies})


def as_tuple(outputs: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def gradients(
    outputs: Tensor | tuple[Tensor, ...], leaves: tuple[Tensor, ...], upstream: Upstream | None, **options: bool
) -> tuple[Tensor, ...]:
    """``torch.autograd.grad`` of those outputs that an upstream gradient reaches; None for it is the number 1."""
    if upstream is None:
        return torch.autograd.grad(outputs, leaves, **options)
    reached = [(o, u) for o, u in zip(as_tuple(outputs), as_tuple(upstream), strict=True) if u is not None]
    return torch.autograd.grad([o for o, _ in reached], leaves, [u for _, u in reached], **options)


@dataclass(frozen=True)
class Provider:
    """``make()`` is called once for each case and gives the call; ``context()`` is entered around its calls, outside
    the timed region; ``unavailable(device)`` gives None, or the reason it cannot run there; ``limit(inputs)`` None, or
    the reason it does not take this case.

    ``function`` names the entry of `Op.truths` by which it is judged: empty for the operation itself. ``overwrites``
    names the inputs that it is known to write over: it is given copies of its own, made outside the timed region.
    ``one_backward`` tells why a graph of it has one backward alone, if so: the pass "backward" takes many.
    ``dtypes`` are those in which it is another than the rest, None for all.
    """

    name: str
    make: Callable[[], Call]
    unavailable: Callable[[torch.device], str | None] = lambda device: None
    limit: Callable[[Inputs], str | None] = lambda inputs: None
    context: Callable[[], AbstractContextManager] = nullcontext
    function: str = ""
    overwrites: tuple[str, ...] = ()
    one_backward: str = ""
    dtypes: tuple[torch.dtype, ...] | None = None

    def takes(self, dtype: torch.dtype) -> bool:
        return self.dtypes is None or dtype in self.dtypes

    @property
    def ours(self) -> bool:
        return self.name.partition(":")[0] == "fused"


@dataclass(frozen=True)
class Op:
    """An operation to benchmark.

    ``baseline`` is what a user of torch writes; ``fused`` calls ours; ``compiled`` makes torch.compile's call, where
    that is not of ``baseline`` as it is. ``dims`` names a shape's numbers, of `DIMS`.
    ``inputs(shape, dtype, device, seed)`` makes a case. ``truths[function](inputs)`` gives the fp64 truth: y, and for
    each leaf its gradient, under d and the leaf's name; ``truth_of_call(inputs, call)`` gives it in their place where
    it depends on the call, by a random mask. ``outputs`` names what a call gives, where that is more than y.
    ``bytes_moved(pass, shape, dtype)`` counts the bytes of an ideal pass, None where that says nothing. ``shapes`` run
    by default, by device type, ``quick_shapes`` as ``--shapes quick``, and ``sweeps[name]`` as ``--shapes name``.
    ``dtypes`` are those that run unless others are asked for, by device type. ``note`` is told above its table.
    ``providers`` is what it is compared with, by name.
    """

    name: str
    group: str
    dims: tuple[str, ...]
    baseline: Call
    fused: Call
    inputs: Callable[[Shape, torch.dtype, torch.device, int], Inputs]
    truths: Mapping[str, Callable[[Inputs], dict[str, Tensor]]]
    bytes_moved: Callable[[str, Shape, torch.dtype], int | None]
    shapes: Shapes
    quick_shapes: Shapes
    sweeps: Mapping[str, Shapes]
    compiled: Callable[[], Call] | None = None
    passes: tuple[str, ...] = PASSES
    outputs: tuple[str, ...] = ("y",)
    truth_of_call: Callable[[Inputs, Call], dict[str, Tensor]] | None = None
    dtypes: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: dict.fromkeys(("cpu", "cuda"), ("fp32", "bf16"))
    )
    note: str = ""
    providers: dict[str, Provider] = field(default_factory=dict)

    def make_inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        return self.inputs(shape, dtype, device, seed)

    def model_names(self, shape: Shape) -> str:
        """The models that have an operation of this shape, by its columns; "" if none has."""
        return model_names(shape, vocabulary=self.group in ("ticks", "softcap"))


def random_tensors(dtype: torch.dtype, device: torch.device, seed: int) -> Callable[..., Tensor]:
    """``rand(*shape, shift=0.0, scale=1.0)``: normal numbers, the same ones for every dtype."""
    g = torch.Generator(device).manual_seed(seed)

    def rand(*shape: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
        t = torch.randn(*shape, generator=g, device=device, dtype=torch.float32)
        return t.mul_(scale).add_(shift).to(dtype)

    return rand
