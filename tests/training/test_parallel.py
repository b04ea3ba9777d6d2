"""Two processes on one batch equal one process, for every pair of losses that a recipe combines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from training_jobs import Job, assert_equal, cases, curve, events

from retrieval_kd.artifacts import Artifact, Spec, build
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.recipes.loader import load_recipe
from retrieval_kd.stages import Workspace
from retrieval_kd.stages.training import TrainingStage
from retrieval_kd.training.machine import Machine

HERE = Path(__file__).parent
SPEC = Spec("train", {})


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all cases once under torchrun: starting two processes costs more than all of them."""
    folder = tmp_path_factory.mktemp("together")
    path = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "parallel_cases.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_two_processes_equal_one_in_loss_and_every_gradient(together: Path) -> None:
    """Without it a second process would train another model (sentence-transformers#3415), or misalign the gather."""
    found = load_file(together / "process-0.safetensors")
    count = 0
    for case in cases():
        theirs = {key.split("|")[1]: tensor for key, tensor in found.items() if key.startswith(f"{case.label}|")}
        loss = float(theirs.pop("loss"))
        # One process neither caches nor cuts its batch alike: both must change nothing.
        assert_equal((loss, theirs), case.step(gradient_cache=False, micro_tokens=96), 1e-6)
        count += 1
    assert count >= 8 + 4 * 4


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(together: Path, tmp_path: Path) -> None:
    """Without it the processes could drift apart, log twice, or load other weights as the best ones."""
    first, second = (load_file(together / f"process-{index}.safetensors") for index in range(2))
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key
    alone = Job("symmetric")
    alone.student.double()
    alone.run(tmp_path)
    for name, tensor in alone.student.state_dict().items():
        assert torch.allclose(tensor, first[f"run|{name}"], atol=1e-7), name
    assert [row[:2] for row in curve(together / "run")] == [row[:2] for row in curve(tmp_path)]
    for one, two in zip(events(tmp_path), events(together / "run"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
        assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=1e-6)


@pytest.mark.slow
def test_a_recipe_trains_under_torchrun(together: Path) -> None:
    """Without it the processes would fight over the mining and scoring before training, or print and publish twice."""
    said = json.loads((together / "stdout-0.json").read_text())
    assert (together / "stdout-1.json").read_text() == ""
    (stage,) = together.glob("artifacts/train-*")
    assert str(stage) in json.dumps(said)
    assert TorchEncoder.open(stage).card.role == "symmetric"
    assert Artifact.load(stage, "train").summary["steps"] == 24
    assert len(list(together.glob("artifacts/*/manifest.json"))) == len(list(together.glob("artifacts/*")))


@pytest.mark.slow
def test_a_student_that_lost_a_file_is_trained_again_by_all(together: Path) -> None:
    """Without it a damaged student could be mended by one process alone only."""
    again = json.loads((together / "stdout-again-0.json").read_text())
    (stage,) = together.glob("artifacts/train-*")
    assert again["student"] == str(stage)
    assert (stage / "card.json").is_file()


@pytest.mark.parametrize("finished", [True, False])
def test_another_process_trains_exactly_when_the_first_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    """Without it the others could take a manifest's word while the first trains anew, and all wait for ever."""
    build(tmp_path, SPEC, lambda folder: {})
    trained = of_a_process(1, tmp_path, monkeypatch, lambda _: finished).folder
    assert trained == tmp_path
    assert (tmp_path / "trained").exists() == (not finished)


@pytest.mark.parametrize("whole", [True, False])
def test_the_first_process_tells_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """Without it a student that lost a file would be told as finished, and then trained by the first alone."""
    build(tmp_path, SPEC, lambda folder: {"bytes": (folder / "weights").write_bytes(b"1")})
    if not whole:
        (tmp_path / "weights").unlink()
    told: list[object] = []
    _ = of_a_process(0, tmp_path, monkeypatch, told.append).folder
    assert told == [whole]
    assert (tmp_path / "trained").exists() == (not whole)


def of_a_process(
    index: int, folder: Path, monkeypatch: pytest.MonkeyPatch, agree: Callable[[object], object]
) -> TrainingStage:
    """Return a stage that process ``index`` of two trains into ``folder``, which only leaves a file there."""
    machine = SimpleNamespace(main=index == 0, agree=agree, wait=lambda: None)
    monkeypatch.setattr("retrieval_kd.training.machine.Machine", lambda: machine)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(index))
    monkeypatch.setattr(TrainingStage, "_plan", lambda self: (folder, SPEC))
    monkeypatch.setattr(TrainingStage, "_parts", None)
    monkeypatch.setattr(TrainingStage, "_train", lambda self, at: {"bytes": (at / "trained").write_bytes(b"2")})
    recipe = load_recipe("margin_mse")
    return TrainingStage(Workspace(recipe, folder / "artifacts"), recipe.training[0], ())


def test_processes_tell_one_another_no_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it whoever reaches the port of the process group could have every process run code."""
    told = {"best": 0.1 + 0.2, "warnings": ["é"], "steps": 24, "none": None}
    first, second = Machine(), Machine()
    first.processes, second.processes, second.index = 2, 2, 1
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(distributed, "broadcast", lambda tensor, src: sent.append(tensor.clone()))
    assert first.agree(told) == told
    assert json.loads(bytes(sent[-1].tolist())) == told
    monkeypatch.setattr(distributed, "broadcast", lambda tensor, src: tensor.copy_(sent.pop(0)))
    assert second.agree({}) == told
