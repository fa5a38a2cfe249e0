"""The code of docs/integrations.md runs as it stands, and trains as the same code without fused_norm does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fused_norm

transformers = pytest.importorskip("transformers", reason="the integrations are shown on models of transformers")

import worker_integrations as integrations  # noqa: E402
from subprocesses import assert_passed  # noqa: E402

TRAINER, ACCELERATE, LIGHTNING = "transformers Trainer", "accelerate", "PyTorch Lightning"
NEEDS = {TRAINER: "accelerate", ACCELERATE: "accelerate", LIGHTNING: "lightning"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to write in, one thread, and no state of accelerate's that the next test would find."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)


@pytest.fixture(params=NEEDS)
def section(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(NEEDS[request.param], reason=f"{NEEDS[request.param]} is not installed")
    return request.param


def test_every_section_is_run() -> None:
    assert {*NEEDS, *integrations.DISTRIBUTED, "Activation checkpointing"} == integrations.SECTIONS.keys()
    assert integrations.DOCUMENT.read_text(encoding="utf-8").count("```python") == len(integrations.SECTIONS)


def _losses(names: dict) -> list[float]:
    if "losses" in names:
        return names["losses"]
    if "trainer" in names and hasattr(names["model"], "losses"):
        return names["model"].losses
    return [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]


def test_trains_as_the_plain_code_does(section: str) -> None:
    begin = integrations.start(section)
    ours = integrations.run(section, "fused")
    theirs = integrations.run(section, "plain")
    integrations.assert_fused(ours)
    integrations.assert_losses_equal(_losses(ours), _losses(theirs))
    integrations.assert_trained_alike(begin, ours, theirs)


def test_runs_as_written_and_the_checkpoint_is_the_stock_models(section: str, folder: Path) -> None:
    names = integrations.run(section, "written")
    assert all(0 < loss < 10 for loss in _losses(names))
    trained = integrations.trained(names).state_dict()
    if section == TRAINER:
        restored, saved = names["model"].state_dict(), folder / "out" / "last"
        stock = transformers.BertForSequenceClassification.from_pretrained(saved)
    elif section == ACCELERATE:
        stock = transformers.LlamaForCausalLM(names["config"])
        stock.load_state_dict(_safetensors(folder / "checkpoint" / "model.safetensors"), strict=False)
        stock.tie_weights()
        restored = names["model"].state_dict()
    else:
        restored = names["restored"].state_dict()
        assert fused_norm.unpatch(names["restored"]), "what was restored is patched"
        checkpoint = torch.load(folder / "model.ckpt", weights_only=False)["state_dict"]
        trained = {name.removeprefix("model."): t for name, t in trained.items()}
        restored = {name.removeprefix("model."): t for name, t in restored.items()}
        stock = transformers.GPT2LMHeadModel(names["model"].model.config)
        stock.load_state_dict({name.removeprefix("model."): t for name, t in checkpoint.items()})
    for other in (restored, stock.state_dict()):
        assert trained.keys() == other.keys()
        assert all(torch.equal(t, other[name]) for name, t in trained.items())


def _safetensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_a_resumed_trainer_ends_where_an_uninterrupted_one_does() -> None:
    """With dropout: the masks follow torch's generator, which the Trainer's checkpoint holds."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    names = integrations.run(TRAINER, "written")
    whole = [p.detach().clone() for p in names["trainer"].model.parameters()]
    resumed = transformers.Trainer(
        model=names["model"],
        args=names["arguments"],
        train_dataset=names["rows"],
        compute_loss_func=fused_norm.TrainerLoss(ticks_weight=1e-3),
    )
    resumed.train(resume_from_checkpoint="out/checkpoint-3")
    assert resumed.state.global_step == 6
    for a, b in zip(resumed.model.parameters(), whole, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_draw_the_same_masks(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout the gradients are those without checkpointing, to the bit."""
    code = integrations.SECTIONS["Activation checkpointing"]
    assert '"use_reentrant": False' in code
    gradients = []
    for changed in (
        code.replace('"use_reentrant": False', f'"use_reentrant": {reentrant}'),
        code.replace("model.gradient_checkpointing_enable", "(lambda **options: None)"),
    ):
        assert changed != code or not reentrant
        monkeypatch.setitem(integrations.SECTIONS, "Activation checkpointing", changed)
        names = integrations.run("Activation checkpointing", "written")
        assert names["model"].is_gradient_checkpointing == (len(gradients) == 0)
        gradients.append([p.grad for p in names["model"].parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each of two processes, started by torchrun, found in the checks of worker_integrations.py."""
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not there")
    folder = tmp_path_factory.mktemp("torchrun")
    environment = os.environ | {"PYTHONPATH": str(Path(fused_norm.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's own name may not resolve in a container
    # What torchrun is, by the interpreter that runs this. A free port, on this machine alone.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    with open(folder / "log", "w") as log:
        command = [*torchrun, integrations.__file__, str(folder)]
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=300)
    found = []
    for rank in range(2):
        file = folder / f"outcomes{rank}"
        outcomes = json.loads(file.read_text()) if file.exists() else {}
        found.append({"log": (folder / "log").read_text()[-3000:]} | outcomes)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("check", [check.__name__ for check in integrations.CHECKS])
def test_two_processes(check: str, two_processes: list[dict[str, str | None]]) -> None:
    assert_passed(check, two_processes)
