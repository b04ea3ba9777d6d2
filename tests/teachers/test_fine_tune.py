"""Fine-tuning: the loss is the one named, a killed run ends with the same bits, and it learns."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from retrieval_kd.artifacts import Artifact
from retrieval_kd.errors import ArtifactError, DataError, RecipeError
from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.recipes.schema import FineTuneSpec
from retrieval_kd.teachers import fine_tune, learning
from retrieval_kd.teachers.cross_encoder import CrossEncoder
from retrieval_kd.teachers.fine_tune import fine_tune_ranker, listwise_loss

from .conftest import ModelMaker, TinyCollection

LISTS = [CandidateList(f"q{i}", (f"d{i}", f"d{i + 10}", f"d{i + 20}", f"d{39 - i}"), (1, 0, 0, 0)) for i in range(10)]


def spec(start: Path, **changes: object) -> FineTuneSpec:
    """Return a short schedule: three epochs of four steps."""
    return FineTuneSpec(**{"start": str(start), "epochs": 3, "batch_queries": 3, "learning_rate": 5e-3, **changes})


def metrics(artifact: Artifact) -> list[dict[str, float]]:
    """Return the log without what a clock decides."""
    lines = [json.loads(line) for line in (artifact.path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "pairs_per_second"} for line in lines]


def test_listwise_loss_golden() -> None:
    """Short lists must not see their padding, and the positive is the first score and no other."""
    scores = torch.tensor([1.0, 0.0, 2.0, 2.0, 2.0])
    assert listwise_loss(scores, [2, 3]).item() == pytest.approx(np.log(1 + np.exp(-1)) + np.log(3))
    assert listwise_loss(torch.tensor([50.0, 0.0]), [2]).item() == pytest.approx(0, abs=1e-6)
    assert listwise_loss(torch.tensor([0.0, 50.0]), [2]).item() == pytest.approx(50)


def test_it_learns_and_opens_as_a_teacher(make_model: ModelMaker, tiny: TinyCollection, tmp_path: Path) -> None:
    """A sign or a label the wrong way round would train a teacher that prefers the negatives."""
    start = make_model(
        "bare", labels=0, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    artifact = fine_tune_ranker(
        "cross_encoder", tiny, LISTS, spec(start, epochs=30, batch_queries=10), 64, 13, tmp_path / "t"
    )
    losses = [line["loss"] for line in metrics(artifact)]
    assert losses[-1] < 0.5 * losses[0]
    teacher = CrossEncoder.load(str(artifact.path), 64)
    texts = tiny.contents([doc_id for item in LISTS for doc_id in item.doc_ids])
    first = [
        teacher.score([(tiny.queries()[item.query_id], texts[doc_id]) for doc_id in item.doc_ids]).argmax() == 0
        for item in LISTS
    ]
    assert np.mean(first) > 0.7
    assert artifact.stage == "teach"
    assert artifact.summary == {"steps": 30, "lists": 10}
    assert not (artifact.path / learning.CHECKPOINT).exists()


def test_a_killed_run_ends_with_the_same_bits(
    make_model: ModelMaker, tiny: TinyCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, moments, batch order or the rate picked up wrongly would give another teacher after a crash."""
    start = make_model("bare", labels=0)
    monkeypatch.setattr(learning, "CHECKPOINT_STEPS", 5)
    whole = fine_tune_ranker("cross_encoder", tiny, LISTS, spec(start), 64, 13, tmp_path / "whole")
    torch.rand(3)  # whatever the process drew before must not matter

    loss = fine_tune.listwise_loss
    calls = 0

    def dies_in_step_eight(scores: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return loss(scores, lengths)

    with monkeypatch.context() as patch:
        patch.setattr(fine_tune, "listwise_loss", dies_in_step_eight)
        with pytest.raises(KeyboardInterrupt):
            fine_tune_ranker("cross_encoder", tiny, LISTS, spec(start), 64, 13, tmp_path / "killed")
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert (tmp_path / "killed" / learning.CHECKPOINT).is_file()
    resumed = fine_tune_ranker("cross_encoder", tiny, LISTS, spec(start), 64, 13, tmp_path / "killed")
    assert (resumed.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()
    assert metrics(resumed) == metrics(whole)
    other = fine_tune_ranker("cross_encoder", tiny, LISTS, spec(start), 64, 14, tmp_path / "other")
    assert metrics(other) != metrics(whole)


def test_parts_add_up_to_the_step(
    make_model: ModelMaker, tiny: TinyCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accumulating gradients over parts of a step must be the step, or memory would change the model."""
    start = make_model("bare", labels=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    one = spec(start, epochs=1, batch_queries=10, warmup=0.0)
    whole = metrics(fine_tune_ranker("cross_encoder", tiny, LISTS, one, 64, 13, tmp_path / "whole"))
    monkeypatch.setattr(learning, "_GRAPH_TOKENS", 1)
    parts = metrics(fine_tune_ranker("cross_encoder", tiny, LISTS, one, 64, 13, tmp_path / "parts"))
    assert parts[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5)
    assert parts[0]["gradient_norm"] == pytest.approx(whole[0]["gradient_norm"], rel=1e-4)


def test_the_spec_limits_lists_and_negatives(make_model: ModelMaker, tiny: TinyCollection, tmp_path: Path) -> None:
    """A limit that is read and not obeyed would make the demo ten times longer."""
    short = spec(make_model("bare", labels=0), queries=4, negatives=1, epochs=1)
    artifact = fine_tune_ranker("cross_encoder", tiny, LISTS, short, 64, 13, tmp_path / "t")
    assert artifact.summary == {"steps": 2, "lists": 4}
    item = CandidateList("q", ("p1", "p2", "n1", "n2", "n3"), (2, 1, 0, 0, 0))
    assert learning._positive_first(item, 2) == ("p1", "n1", "n2")


class Rooted:
    """A lesson whose loss is a number and whose gradient at zero is none."""

    dropout = False

    def __len__(self) -> int:
        """Return the number of lists."""
        return 2

    def rows(self, positions: Iterable[int]) -> list[list[SimpleNamespace]]:
        """Return a row for each list."""
        return [[SimpleNamespace(ids=[1, 2], type_ids=[0, 0])] for _ in positions]

    def loss(self, model: torch.nn.Linear, rows: Sequence[object], device: torch.device) -> tuple:
        """Return a root of nothing."""
        return torch.sqrt((0 * model.weight).sum()), []


def test_a_gradient_that_is_no_number_moves_nothing(tmp_path: Path) -> None:
    """Without it the weights would be NaN before anyone looked, and the error speak of JSON."""
    model = torch.nn.Linear(2, 1)
    before = model.weight.detach().clone()
    with pytest.raises(DataError, match="step 1 of teach: gradient norm is nan; lower its learning_rate"):
        learning.learn(model, Rooted(), FineTuneSpec(start="x"), 1, tmp_path, "teach")
    assert torch.equal(model.weight, before)


def test_bad_input_is_refused(make_model: ModelMaker, tiny: TinyCollection, tmp_path: Path) -> None:
    """Each of these would otherwise end in a stack trace, or in a teacher of noise."""
    start = make_model("bare", labels=0)
    with pytest.raises(DataError, match="no lists"):
        fine_tune_ranker("cross_encoder", tiny, [], spec(start), 64, 13, tmp_path / "t")
    with pytest.raises(DataError, match="no query 'nobody'"):
        fine_tune_ranker(
            "cross_encoder", tiny, [CandidateList("nobody", ("d1", "d2"), (1, 0))], spec(start), 64, 13, tmp_path / "t"
        )
    with pytest.raises(DataError, match="'nowhere'"):
        fine_tune_ranker(
            "cross_encoder", tiny, [CandidateList("q1", ("d1", "nowhere"), (1, 0))], spec(start), 64, 13, tmp_path / "t"
        )
    with pytest.raises(RecipeError, match="65 is more than the 64"):
        fine_tune_ranker("cross_encoder", tiny, LISTS, spec(start), 65, 13, tmp_path / "t")
    weights = start / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ArtifactError, match="cannot read the encoder"):
        fine_tune_ranker("cross_encoder", tiny, LISTS, spec(start), 64, 13, tmp_path / "t")
