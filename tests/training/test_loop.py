"""The loop: it learns, it resumes to the bit, and it leaves the best weights behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_encoder
from torch import nn
from training_jobs import SCHEDULE, curve, events, every_loss, job, stopping_after

from retrieval_kd.errors import ArtifactError, DataError
from retrieval_kd.losses.registry import LOSSES
from retrieval_kd.recipes.schema import LossSpec
from retrieval_kd.training.checkpoint import load_checkpoint, load_weights, save_checkpoint
from retrieval_kd.training.loop import BEST, LAST
from retrieval_kd.training.terms import Terms
from retrieval_kd.training.towers import LiveDocuments


@pytest.mark.parametrize("mode", ["asymmetric", "symmetric"])
def test_training_learns(tmp_path: Path, mode: str) -> None:
    """Without it the gradient could flow nowhere and the student would be the layer cut under another name."""
    _, summary = job(tmp_path, mode)
    rows = curve(tmp_path)
    losses = [value for _, event, value in rows if event == "train"]
    dev = [value for _, event, value in rows if event == "dev"]
    assert len(losses) == 9
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    # Nine steps move a symmetric student's documents too little to say anything about its ranking.
    assert mode == "symmetric" or max(dev) > dev[0]
    assert summary["dev_nDCG@10"] == max(dev[1:])


def test_the_best_weights_are_left_in_the_student(tmp_path: Path) -> None:
    """Without it the last weights would be exported under the best ones' figure."""
    student, summary = job(tmp_path)
    reference, _ = job(tmp_path / "again")
    facts = load_weights(tmp_path / BEST, nn.ModuleDict({"student": reference}))
    assert facts == {"step": summary["best_step"], "nDCG@10": summary["dev_nDCG@10"]}
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, reference.state_dict()[name]), name


def without_speed(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key != "texts_per_second"}


@pytest.mark.parametrize("steps", [1, 8])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path, steps: int) -> None:
    """Without it a resumed run restarts at a higher loss (sentence-transformers#3756), with other dropout draws."""
    with stopping_after(steps):
        job(tmp_path / "a", dropout=0.2)
    resumed, summary = job(tmp_path / "a", dropout=0.2)
    whole, expected = job(tmp_path / "b", dropout=0.2)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert without_speed(summary) == without_speed(expected)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_kill_costs_neither_weights_nor_what_losses_remember(tmp_path: Path) -> None:
    """Without it a memory bank would come back empty, TAID's blend at its start, and LwF's copy as it is now."""
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        from pathlib import Path
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
        from training_jobs import SCHEDULE, curve, every_loss, events, job, stopping_after
        with stopping_after(5, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            every_loss(Path(sys.argv[1]), "symmetric")
        """
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    resumed, _ = every_loss(tmp_path / "a", "symmetric")
    whole, _ = every_loss(tmp_path / "b", "symmetric")
    for one, other in zip(events(tmp_path / "a"), events(tmp_path / "b"), strict=True):
        assert one["losses"] == other["losses"]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("mode", ["asymmetric", "symmetric"])
def test_every_loss_of_the_registry_trains(tmp_path: Path, mode: str) -> None:
    """Without it a recipe could name a loss whose inputs no step makes, found after hours of scoring."""
    every_loss(tmp_path, mode)
    rows = events(tmp_path)
    assert {len(row["losses"]) for row in rows} == {len(LOSSES)} == {28}
    assert np.mean([row["loss"] for row in rows[-3:]]) < np.mean([row["loss"] for row in rows[:3]])
    # The copy is as the student was: dropout alone sets them apart at the first step.
    forgetting = [row["losses"]["learning_without_forgetting"] for row in rows]
    assert max(forgetting) > 0


def test_a_last_batch_too_short_to_compare_trains(tmp_path: Path) -> None:
    """Without it a run over 23 + 1 lists would die at the end of its first epoch."""
    names = ["relational_distance", "relational_angle", "contrastive_kd"]
    losses = [LossSpec(name, options={"size": 0} if name == "contrastive_kd" else {}) for name in names]
    job(tmp_path, losses=losses, schedule=replace(SCHEDULE, batch_queries=23, epochs=1))
    assert [row["loss"] > 0 for row in events(tmp_path)] == [True, False]


def test_a_finished_run_started_again_changes_nothing(tmp_path: Path) -> None:
    """Without it a kill between the last step and the manifest would train the whole schedule once more."""
    _, first = job(tmp_path)
    before = curve(tmp_path)
    _, again = job(tmp_path)
    assert without_speed(again) == without_speed(first)
    assert curve(tmp_path) == before


def test_each_document_is_encoded_once_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it shared negatives would cost a forward pass for every list they stand in."""
    seen: list[tuple[str, ...]] = []
    encode = LiveDocuments.encode

    def counted(self: LiveDocuments, doc_ids: Any, *rest: Any) -> Any:
        seen.append(tuple(doc_ids))
        return encode(self, doc_ids, *rest)

    monkeypatch.setattr(LiveDocuments, "encode", counted)
    job(tmp_path, "symmetric")
    assert len(seen) == 9
    assert all(len(ids) == len(set(ids)) <= 20 for ids in seen)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it one overflow would turn every weight into NaN and the run would go on to the end."""
    call = Terms.__call__
    monkeypatch.setattr(Terms, "__call__", lambda *args: {k: v * float("inf") for k, v in call(*args).items()})
    with pytest.raises(DataError, match=r"step 1: loss is .*listwise_kl .*lower schedule\.learning_rate"):
        job(tmp_path)


def test_torn_and_foreign_checkpoints_are_named(tmp_path: Path) -> None:
    """Without it a torn file would end in a trace, and another student's weights could be trained on."""
    encoder = tiny_encoder()
    optimizer = torch.optim.AdamW(encoder.parameters())
    path = tmp_path / LAST
    save_checkpoint(path, encoder, optimizer, {"step": 1})
    other = tiny_encoder(layers=1)
    with pytest.raises(ArtifactError, match=r"last\.safetensors: holds another model's weights"):
        load_checkpoint(path, other, torch.optim.AdamW(other.parameters()))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=r"last\.safetensors: torn or not a checkpoint"):
        load_checkpoint(path, encoder, optimizer)
