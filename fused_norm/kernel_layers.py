"""Our norms as layers of Hugging Face's ``kernels`` package, which transformers puts in the place of its own::

    import kernels
    from fused_norm.kernel_layers import kernel_mapping

    kernels.register_kernel_mapping(kernel_mapping())
    kernels.kernelize(model, mode=kernels.Mode.TRAINING)

This is another way to what :func:`fused_norm.patch` does to norms of RMSNorm's kind, and less of it: only classes that
transformers marks for ``kernels`` are swapped, no residual path is fused, and transformers marks them only if it finds
a version of ``kernels`` that it takes. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from . import adapters


class _Layer(nn.Module):
    """What ``kernels`` asks of a layer: no constructor, no other members, the forward of the class it replaces.

    It is bound to modules of several classes, which transformers marks alike though they round differently: each gets
    what :func:`fused_norm.patch` would give it.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return (adapters.adapter(type(self)) or type(self)).forward(self, hidden_states)


class _Repository:
    """Where ``kernels`` gets a layer from: here."""

    layer_name = _Layer.__name__

    def load(self) -> type[nn.Module]:
        return _Layer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Repository)

    def __hash__(self) -> int:
        return hash(_Repository)

    def __str__(self) -> str:
        return "fused_norm"


def kernel_mapping(devices: Iterable[str] = ("cpu", "cuda", "rocm", "xpu")) -> dict[str, dict[str, _Repository]]:
    """What ``kernels.register_kernel_mapping`` takes: our layer for the names that transformers gives its RMSNorms."""
    return {name: {device: _Repository() for device in devices} for name in ("RMSNorm", "RMSNormZeroCentered")}
