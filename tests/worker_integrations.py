"""The Python of docs/integrations.md, run as it stands or compared; for tests/test_integrations.py, and for torchrun:

    torchrun --nproc-per-node 2 worker_integrations.py FOLDER

runs the sections for several processes, each in both ways, and every check of CHECKS. Each process writes
{name: None or a traceback} to FOLDER/outcomesRANK as JSON. One start of the processes, which is slow, serves all.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fused_norm
import fused_norm.functional as FF

DOCUMENT = Path(__file__).parents[1] / "docs" / "integrations.md"
_SECTION = re.compile(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SECTIONS: dict[str, str] = dict(_SECTION.findall(DOCUMENT.read_text(encoding="utf-8")))
DISTRIBUTED = ("torchrun and DDP", "FSDP2")


# ------------------------------------------------------------------------------- the same code without fused_norm in it


class PlainLoss(nn.Module):
    """TicksCrossEntropyLoss in plain torch, for class indices."""

    def __init__(self, ticks_weight: float) -> None:
        super().__init__()
        self.ticks_weight = ticks_weight

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        return (-log_p + self.ticks_weight * (log_p.exp() - log_p)).mean()


class PlainTrainerLoss(PlainLoss):
    def forward(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        return super().forward(outputs.logits, labels) * len(labels) / (num_items_in_batch or len(labels))


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _plain_patch(model: nn.Module) -> str:
    _without_dropout(model)
    return "nothing patched"


def run(section: str, how: str) -> dict[str, Any]:
    """The names that a section of the document leaves behind, and in ``reports`` what ``patch`` did, call by call, in
    ``add_norms`` how often a residual connection and its norm were one.

    ``how``: "written"; "fused", with the models' dropout set to 0; "plain", the same without fused_norm.
    """
    reports: list[Any] = []
    patch = fused_norm.patch

    def fused_patch(model: nn.Module) -> Any:
        if how == "fused":
            _without_dropout(model)
        reports.append(patch(model))
        return reports[-1]

    with contextlib.ExitStack() as stack:
        replacements: dict[str, Any] = {"patch": fused_patch}
        if how == "plain":
            replacements = {"patch": _plain_patch, "TrainerLoss": PlainTrainerLoss, "TicksCrossEntropyLoss": PlainLoss}
        for name, value in replacements.items():
            stack.enter_context(mock.patch.object(fused_norm, name, value))
        calls = []
        for name in ("add_layer_norm", "add_rms_norm"):
            function = getattr(FF, name)
            counted = lambda *args, function=function, **options: calls.append(1) or function(*args, **options)  # noqa: E731
            stack.enter_context(mock.patch.object(FF, name, counted))
        torch.manual_seed(0)
        names: dict[str, Any] = {"__name__": "integrations"}
        exec(compile(SECTIONS[section], f"{DOCUMENT}, {section}", "exec"), names)
    names |= {"reports": reports, "add_norms": len(calls)}
    return names


def start(section: str) -> dict[str, Tensor]:
    """The parameters with which the section's model starts: it is the first thing that draws random numbers."""
    built: list[nn.Module] = []

    class Built(Exception):
        pass

    def stop(model: nn.Module) -> None:
        built.append(model)
        raise Built

    torch.manual_seed(0)
    with mock.patch.object(fused_norm, "patch", stop), contextlib.suppress(Built):
        exec(compile(SECTIONS[section], f"{DOCUMENT}, {section}", "exec"), {"__name__": "integrations"})
    return {name: p.detach().clone() for name, p in built[0].named_parameters()}


def full(t: Tensor) -> Tensor:
    """All of a tensor of which each process may hold a part."""
    t = t.full_tensor() if hasattr(t, "full_tensor") else t
    return t.detach().clone()


def trained(names: dict[str, Any]) -> nn.Module:
    return getattr(names.get("trainer"), "model", names["model"])


def _optimizer(names: dict[str, Any]) -> torch.optim.Optimizer:
    """The section's own, or its trainer's; accelerate wraps it."""
    if "trainer" in names:
        trainer = names["trainer"]
        optimizer = trainer.optimizers[0] if hasattr(trainer, "optimizers") else trainer.optimizer
    else:
        optimizer = names["optimizer"]
    return getattr(optimizer, "optimizer", optimizer)


def _with_gradient(name: str, t: Tensor) -> Tensor | None:
    """Attention's softmax ignores the bias of the keys: its true gradient is 0, and Adam makes steps of the rounding
    errors that it finds there. GPT-2 has the bias of queries, keys and values in one."""
    if name.endswith("c_attn.bias"):
        queries, _, values = t.chunk(3)
        return torch.cat([queries, values])
    return None if name.endswith("key.bias") else t


def assert_trained_alike(begin: dict[str, Tensor], ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Of every parameter, the whole change made by training differs by 1 % of itself at most, and Adam's first moment,
    a mean of the gradients, by 0.2 %: Adam's steps tell the signs of gradients and hardly their size."""
    prefix = re.compile(r"^(module\.|model\.(?=transformer|lm_head))*")
    found = []
    for names in (ours, theirs):
        state = _optimizer(names).state
        pairs = [(prefix.sub("", name), p) for name, p in trained(names).named_parameters()]
        found.append({name: (full(p) - begin[name], full(state[p]["exp_avg"])) for name, p in pairs})
    assert begin.keys() == found[0].keys() == found[1].keys()
    compared = 0
    for name in begin:
        for what, share, a, b in zip(("change", "mean gradient"), (1e-2, 2e-3), *(f[name] for f in found), strict=True):
            a, b = _with_gradient(name, a), _with_gradient(name, b)
            if a is not None and b is not None:
                error, size = (a - b).norm().item(), b.norm().item()
                assert size > 0, f"{name} has no {what}"
                assert error <= share * size, f"{name}: the {what} is {error / size:.2%} off"
                compared += 1
    assert compared > 20


def assert_fused(ours: dict[str, Any]) -> None:
    """Both halves of patch did something, and the residual connections of each step went through it."""
    assert ours["reports"]
    for report in ours["reports"]:
        assert len(report.swapped) >= 5 and len(report.residual) >= 2 and not report.left and not report.residual_left
    # BERT's embeddings are such a block too, whose position embeddings are broadcast: a sum that is made apart.
    layers = [name for name in ours["reports"][0].residual if "embeddings" not in name]
    assert layers and ours["add_norms"] >= 6 * len(layers)


def assert_losses_equal(ours: list[float], theirs: list[float]) -> None:
    assert len(ours) == len(theirs) >= 6
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-4)
    assert len(set(theirs)) == len(theirs), "the losses of a training differ from step to step"


# -------------------------------------------------------------------------------------------- what two processes check


def _compare(section: str, folder: Path) -> None:
    begin = start(section)
    ours, theirs = run(section, "fused"), run(section, "plain")
    assert_fused(ours)
    assert_losses_equal(ours["losses"], theirs["losses"])
    assert_trained_alike(begin, ours, theirs)
    # Every process holds the same parameters, as averaged gradients make them.
    for name, p in ours["model"].named_parameters():
        mine = full(p)
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, mine), name
    # The checkpoint has the stock model's names, shapes and, after the same training, values.
    saved = torch.load(folder / "model.pt")
    stock = type(getattr(ours["model"], "module", theirs["model"]))(ours["config"])
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in stock.state_dict().items()}
    stock.load_state_dict(saved)


def ddp(folder: Path) -> None:
    """With DDP's defaults a parameter that backward does not reach raises at the next step."""
    _compare("torchrun and DDP", folder)


def fsdp2_with_activation_checkpointing(folder: Path) -> None:
    _compare("FSDP2", folder)


def written(folder: Path) -> None:
    """As the document has it, dropout and all."""
    for section in DISTRIBUTED:
        names = run(section, "written")
        assert all(0 < loss < 10 for loss in names["losses"])


def ddp_options(folder: Path) -> None:
    """static_graph, gradient_as_bucket_view and find_unused_parameters: no warning, no error, the same losses."""
    from torch.nn.parallel import DistributedDataParallel

    plain = run("torchrun and DDP", "plain")["losses"]
    for options in (
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"static_graph": True, "reentrant": True},
    ):
        reentrant = options.pop("reentrant", None)

        def wrap(model: nn.Module, options=options, reentrant=reentrant) -> nn.Module:
            if reentrant:  # backward runs inside backward, which DDP takes with a static graph alone
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            return DistributedDataParallel(model, **options)

        with mock.patch("torch.nn.parallel.DistributedDataParallel", wrap):
            ours = run("torchrun and DDP", "fused")["losses"]
        assert_losses_equal(ours, plain)


def fsdp2_every_norm_sharded_alone(folder: Path) -> None:
    """A norm that is a unit of its own has its parameters gathered by its own forward alone."""
    from torch.distributed.fsdp import fully_shard

    def shard(module: nn.Module, **options: Any) -> nn.Module:
        for child in module.modules():
            if child is not module and "norm" in (name := type(child).__name__).lower() and not name.startswith("FSDP"):
                fully_shard(child, **options)
        return fully_shard(module, **options)

    begin, theirs = start("FSDP2"), run("FSDP2", "plain")
    with mock.patch("torch.distributed.fsdp.fully_shard", shard):
        ours = run("FSDP2", "fused")
    assert_losses_equal(ours["losses"], theirs["losses"])
    assert_trained_alike(begin, ours, theirs)


CHECKS = (ddp, fsdp2_with_activation_checkpointing, written, ddp_options, fsdp2_every_norm_sharded_alone)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank, outcomes = dist.get_rank(), {}
    os.chdir(folder)
    # The sections open and close the group; here it stays open for all of them.
    started = functools.partial(mock.patch.object, dist)
    with started("init_process_group", lambda backend: None), started("destroy_process_group", dist.barrier):
        for check in CHECKS:
            try:
                check(folder)
                outcomes[check.__name__] = None
            except Exception:
                outcomes[check.__name__] = traceback.format_exc()
            (folder / f"outcomes{rank}").write_text(json.dumps(outcomes))
            # After a failure on one side alone the processes no longer speak of the same thing.
            failed = torch.tensor([outcomes[check.__name__] is not None])
            dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
