"""The shapes that are measured: one table for all operations, by device type ("cpu", "cuda").

A norm's shape is (rows, columns), a loss's (rows, classes), a linear loss's (rows, classes, hidden features).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]
Shapes = Mapping[str, tuple[Shape, ...]]


@dataclass(frozen=True)
class Model:
    """The width of a model's norms, and of its vocabulary."""

    name: str
    hidden: int
    vocabulary: int


MODELS = (
    Model("BERT-base", 768, 30522),
    Model("BERT-large", 1024, 30522),
    Model("GPT-2", 768, 50257),
    Model("GPT-2 XL", 1600, 50257),
    Model("Llama-2 7B", 4096, 32000),
    Model("Llama-3 8B", 4096, 128256),
    Model("Llama-3 70B", 8192, 128256),
    Model("Gemma-3 1B", 1152, 262144),
)


def model_names(shape: Shape, vocabulary: bool) -> str:
    """The models with a norm of these columns, or, with ``vocabulary``, with these classes (and hidden features); "" if
    there are none."""
    names = []
    for m in MODELS:
        has = ((m.vocabulary, m.hidden) if len(shape) == 3 else (m.vocabulary,)) if vocabulary else (m.hidden,)
        names += [m.name] * (shape[1:] == has)
    return ", ".join(names)


def _powers(base: int, low: int, high: int) -> tuple[int, ...]:
    """The powers of ``base`` from ``low``, which is one, to ``high``."""
    return (low, *_powers(base, low * base, high)) if low <= high else ()


def _models(m: int, *dims: str, largest: int | None = None) -> tuple[Shape, ...]:
    """A shape of m rows for each model, as often as there are different ones; ``largest`` bounds classes x features."""
    fitting = (model for model in MODELS if largest is None or model.vocabulary * model.hidden <= largest)
    return tuple(dict.fromkeys((m, *(getattr(model, dim) for dim in dims)) for model in fitting))


def _columns(elements: int, low: int, *rest: int) -> tuple[Shape, ...]:
    """From ``low`` columns to 262144, with as many rows as make the same number of elements: equal traffic."""
    return tuple((elements // n, n, *rest) for n in _powers(2, low, 262144))


def _rows(high: int, *rest: int) -> tuple[Shape, ...]:
    """From one row to ``high``."""
    return tuple((m, *rest) for m in _powers(4, 1, high))


#: CPU: small models, a GPT-2 XL width, square, wide, narrow, very wide, odd. CUDA: the widths with published figures at
#: 4096 rows (launch-bound to bandwidth-bound), 64M elements from narrow to very wide.
NORM_SHAPES: Shapes = {
    "cpu": (
        (768, 384),
        (512, 768),
        (2048, 1600),
        (4096, 1024),
        (4096, 4096),
        (512, 8192),
        (8192, 128),
        (64, 65536),
        (1000, 1001),
    ),
    "cuda": (
        (4096, 1024),
        (4096, 4096),
        (4096, 16384),
        (65536, 1024),
        (16384, 4096),
        (8192, 8192),
        (2048, 32768),
        (1024, 65536),
        (256, 262144),
        (1000, 1001),
    ),
}
NORM_QUICK_SHAPES: Shapes = {
    "cpu": ((512, 768), (4096, 1024)),
    "cuda": ((4096, 1024), (4096, 4096), (4096, 16384)),
}
#: What bench/targets.py judges, the most telling first, for time may run out: a training shape with published figures,
#: 64M elements and more from the usual widths to the widest, and two shapes that launches bind.
GPU_NORM_SHAPES: Shapes = {
    "cpu": (),
    "cuda": (
        (4096, 1024),
        (16384, 4096),
        (65536, 1024),
        (8192, 8192),
        (4096, 16384),
        (2048, 32768),
        (98304, 768),
        (1024, 65536),
        (256, 262144),
        (512, 768),
        (1, 4096),
    ),
}
NORM_SWEEPS: Mapping[str, Shapes] = {
    "models": {"cpu": _models(2048, "hidden"), "cuda": _models(8192, "hidden")},
    "n": {"cpu": _columns(1 << 22, 64), "cuda": _columns(1 << 26, 128)},
    "m": {"cpu": _rows(4096, 4096), "cuda": _rows(65536, 4096)},
    "gpu": GPU_NORM_SHAPES,
}
#: Of those a few, since there are four operations.
ADD_NORM_SWEEPS: Mapping[str, Shapes] = {
    **NORM_SWEEPS,
    "gpu": {"cpu": (), "cuda": ((4096, 1024), (16384, 4096), (4096, 16384), (2048, 32768), (512, 768))},
}

#: The vocabularies of BERT, Llama 2 and Llama 3, 125 to 263 MB of fp32 logits; on a GPU Gemma's too.
LOSS_SHAPES: Shapes = {
    "cpu": ((1024, 30522), (1024, 32000), (512, 128256)),
    "cuda": tuple((m, v) for v in (32000, 128256, 262144) for m in (4096, 8192)),
}
LOSS_QUICK_SHAPES: Shapes = {"cpu": ((256, 32000),), "cuda": ((4096, 32000), (4096, 128256))}
LOSS_SWEEPS: Mapping[str, Shapes] = {
    "models": {"cpu": _models(256, "vocabulary"), "cuda": _models(4096, "vocabulary")},
    "n": {"cpu": _columns(1 << 24, 1024), "cuda": _columns(1 << 29, 1024)},
    "m": {"cpu": _rows(1024, 32000), "cuda": _rows(4096, 128256)},
    "gpu": {"cpu": (), "cuda": ((4096, 128256), (8192, 32000), (4096, 262144), (512, 32000))},
}

#: The last is Qwen's vocabulary.
LINEAR_SHAPES: Shapes = {
    "cpu": ((512, 32000, 512), (512, 128256, 512)),
    "cuda": tuple((8192, v, 4096) for v in (32000, 128256, 152064)),
}
LINEAR_QUICK_SHAPES: Shapes = {"cpu": ((128, 32000, 256),), "cuda": ((4096, 32000, 4096),)}
LINEAR_SWEEPS: Mapping[str, Shapes] = {
    # The truth holds a classifier and its gradient in fp64: on a CPU, of small ones alone.
    "models": {
        "cpu": _models(128, "vocabulary", "hidden", largest=10**8),
        "cuda": _models(4096, "vocabulary", "hidden"),
    },
    "n": {"cpu": _columns(1 << 23, 1024, 512), "cuda": _columns(1 << 29, 1024, 4096)},
    "m": {"cpu": _rows(1024, 32000, 512), "cuda": _rows(4096, 128256, 4096)},
    "gpu": {"cpu": (), "cuda": tuple((8192, v, 4096) for v in (152064, 32000, 128256))},
}
