"""What a step hands to its losses, field by field against a loop over pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_jobs import SCHEDULE, Job, events

from retrieval_kd.errors import RecipeError
from retrieval_kd.losses.inputs import EmbeddingInputs, InBatchInputs, PairInputs, ScoreInputs, StackInputs
from retrieval_kd.losses.registry import bind
from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.recipes.schema import LossSpec
from retrieval_kd.training.batches import TrainingSet, assemble
from retrieval_kd.training.loop import check_losses
from retrieval_kd.training.terms import Step, Terms

WIDTH = 6


def vectors(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def a_step(**changes: object) -> Step:
    """Two queries of three and two candidates over the documents a, b, c."""
    data = TrainingSet(
        lists=[CandidateList("q1", ("a", "b", "c"), (1, 0, 0)), CandidateList("q2", ("c", "a"), (2, 0))],
        texts={"q1": "one", "q2": "two"},
        teacher=[np.array([3, 2, 1], np.float32), np.array([5, 4], np.float32)],
        qrels={"q1": {"a": 1}, "q2": {"c": 2}},
        query_targets=np.eye(2, dtype=np.float32),
        preferences=[
            np.array([[np.nan, 0.9, np.nan], [0.1, np.nan, 0.5], [np.nan, 0.5, np.nan]], np.float32),
            np.array([[np.nan, 0.7], [0.3, np.nan]], np.float32),
        ],
    )
    batch = assemble(data, np.array([0, 1]))
    values: dict[str, object] = {
        "batch": batch,
        "queries": vectors(2, WIDTH, seed=1),
        "documents": vectors(3, WIDTH, seed=2),
        "query_targets": vectors(2, WIDTH, seed=3),
        "document_targets": vectors(3, WIDTH, seed=4),
        "documents_live": True,
        "teacher": None if batch.teacher is None else batch.teacher.double(),
        "previous": (vectors(2, WIDTH, seed=5), vectors(3, WIDTH, seed=6)),
        "stacks": (vectors(2, 2, 4, seed=7), vectors(3, 2, 4, seed=8)),
        "teacher_stacks": (vectors(2, 2, 5, seed=9), vectors(3, 2, 5, seed=10)),
    }
    return Step(**{**values, **changes})  # type: ignore[arg-type]


COLUMNS = {0: [0, 1, 2], 1: [2, 0]}


def test_scores_of_the_lists_pair_by_pair() -> None:
    """Without it a score could stand beside another document's, or LwF hold on to another query."""
    step = a_step()
    inputs = step.inputs("scores", "scores")
    assert isinstance(inputs, ScoreInputs)
    assert inputs.teacher is not None
    assert inputs.previous is not None
    assert step.previous is not None
    assert inputs.teacher[inputs.mask].tolist() == [3, 2, 1, 5, 4]
    for query, columns in COLUMNS.items():
        for rank, column in enumerate(columns):
            now, then = ((q[query] @ d[column]).item() for q, d in ((step.queries, step.documents), step.previous))
            assert inputs.student[query, rank].item() == pytest.approx(now, abs=1e-12)
            assert inputs.previous[query, rank].item() == pytest.approx(then, abs=1e-12)


def test_in_batch_scores_are_known_where_the_list_is() -> None:
    """Without it the padding's zero would overwrite the teacher's score of the document in column 0."""
    inputs = a_step().inputs("in_batch", "scores")
    assert isinstance(inputs, InBatchInputs)
    assert inputs.teacher is not None
    assert inputs.teacher.tolist() == [[3, 2, 1], [4, 0, 5]]
    assert inputs.scored is inputs.listed or torch.equal(inputs.scored, inputs.listed)  # type: ignore[arg-type]
    assert inputs.listed is not None
    assert inputs.listed.tolist() == [[True, True, True], [True, False, True]]
    assert inputs.positives.tolist() == [[True, False, False], [False, False, True]]
    assert inputs.mask.all()
    assert inputs.documents is not None
    assert torch.allclose(inputs.documents.diagonal(), torch.ones(3, dtype=torch.float64))


def test_lists_know_their_judged_candidates() -> None:
    """Without it a list's second positive would be a negative, or padding have document 0's judgement."""
    step = a_step()
    assert step.listed_positives().tolist() == [[True, False, False], [True, False, False]]
    two = replace(step.batch, positives=torch.ones_like(step.batch.positives))
    for kind in ("scores", "stacks"):
        inputs = replace(step, batch=two).inputs(kind, "scores")  # type: ignore[arg-type]
        assert isinstance(inputs, ScoreInputs | StackInputs)
        assert inputs.positives is not None
        assert torch.equal(inputs.positives, step.batch.mask)


def test_the_encoder_as_teacher_knows_every_pair() -> None:
    """Without it TCT-ColBERT's and TAS-B's in-batch terms would learn from the lists alone."""
    step = a_step()
    inputs = step.inputs("in_batch", "encoder")
    assert isinstance(inputs, InBatchInputs)
    assert inputs.scored is not None
    assert inputs.scored.all()
    assert torch.equal(inputs.teacher, step.query_targets @ step.document_targets.T)  # type: ignore[arg-type]
    lists = step.inputs("scores", "encoder")
    assert isinstance(lists, ScoreInputs)
    assert lists.teacher is not None
    assert float(lists.teacher[1, 0]) == pytest.approx(float(step.query_targets[1] @ step.document_targets[2]))


def test_preferences_keep_their_pair_and_unasked_ones_are_not_compared() -> None:
    """Without it p(i beats j) could be read as p(j beats i), or a NaN reach the loss."""
    inputs = a_step().inputs("pairs", "scores")
    assert isinstance(inputs, PairInputs)
    assert inputs.compared.sum() == 6
    assert inputs.preferences[0, 0, 1] == np.float32(0.9)
    assert inputs.preferences[1, 1, 0] == np.float32(0.3)
    assert torch.isfinite(inputs.preferences).all()
    assert not inputs.compared[1, 2].any()


def test_layers_rank_each_for_itself() -> None:
    """Without it one layer's queries could meet another layer's documents."""
    step = a_step()
    inputs = step.inputs("stacks", "scores")
    assert isinstance(inputs, StackInputs)
    assert inputs.student.shape == (2, 2, 3)
    assert step.stacks is not None
    for layer in range(2):
        for query, columns in COLUMNS.items():
            for rank, column in enumerate(columns):
                expected = step.stacks[0][query, layer] @ step.stacks[1][column, layer]
                assert inputs.student[layer, query, rank] == pytest.approx(float(expected), abs=1e-12)


def test_frozen_documents_are_not_regressed() -> None:
    """Without it asymmetric training would add a constant per document to the embedding loss."""
    live, frozen = (a_step(documents_live=flag).inputs("embeddings", "scores") for flag in (True, False))
    assert isinstance(live, EmbeddingInputs)
    assert isinstance(frozen, EmbeddingInputs)
    assert len(live.student) == len(live.teacher) == 5
    assert len(frozen.student) == len(frozen.teacher) == 2


@pytest.mark.parametrize("name", ["margin_mse", "info_nce", "embedding_regression", "tct", "relational_distance"])
def test_matryoshka_is_the_loss_of_cut_vectors_summed(name: str) -> None:
    """Without it a size could see the full vectors, or cut ones whose length is no longer 1."""
    step = a_step()
    weights = {WIDTH: 1.0, 2: 0.5}
    found = Terms([LossSpec(name)], weights)(step)[name]

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:, :2] / tensor[:, :2].norm(dim=1, keepdim=True)

    by_hand = {name: cut(getattr(step, name)) for name in ("queries", "documents", "query_targets", "document_targets")}
    if name != "tct":
        small = replace(step, **by_hand)
    else:
        small = replace(step, queries=by_hand["queries"], documents=by_hand["documents"])
    parts = [Terms([LossSpec(name)], {view.queries.shape[1]: 1.0})(view)[name] for view in (step, small)]
    assert found == pytest.approx(float(parts[0] + 0.5 * parts[1]), rel=1e-12)


def test_sizes_are_weighed_as_the_schedule_says(tmp_path: Path) -> None:
    """Without it the small sizes, whose losses are larger, could not be held back."""
    found = []
    for number, weights in enumerate([(1.0, 0.0), (0.0, 1.0), (2.0, 3.0)]):
        schedule = replace(SCHEDULE, epochs=1, size_weights=weights)
        Job(sizes=(8,)).run(tmp_path / str(number), (LossSpec("listwise_kl"),), schedule)
        found.append(events(tmp_path / str(number))[0]["loss"])
    assert found[2] == pytest.approx(2 * found[0] + 3 * found[1], rel=1e-5)
    with pytest.raises(RecipeError, match=r"size_weights: 1 weights for the widths \[16, 8\]; give one for each"):
        Job(sizes=(8,)).run(tmp_path / "x", (LossSpec("listwise_kl"),), replace(SCHEDULE, size_weights=(1.0,)))


def test_targets_of_another_width_stay_whole() -> None:
    """Without it a relational loss would compare a small size with a random cut of a wider teacher."""
    step = a_step(query_targets=vectors(2, 9, seed=3), document_targets=vectors(3, 9, seed=4))
    small = replace(step, queries=F.normalize(step.queries[:, :2]), documents=F.normalize(step.documents[:, :2]))
    found = Terms([LossSpec("relational_distance")], {2: 1.0})(step)["relational_distance"]
    expected = bind("relational_distance", {})(
        torch.cat([small.queries, small.documents]), torch.cat([step.query_targets, step.document_targets])
    )
    assert found == pytest.approx(float(expected), rel=1e-12)


def test_the_frozen_copy_is_the_student_as_the_stage_began(tmp_path: Path) -> None:
    """Without it learning without forgetting would hold on to the present student, which costs nothing."""
    losses = (LossSpec("listwise_kl"), LossSpec("learning_without_forgetting"))
    Job("symmetric").run(tmp_path, losses, SCHEDULE)
    values = [row["losses"]["learning_without_forgetting"] for row in events(tmp_path)]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[-1] > 1e-6


def test_a_loss_without_its_teacher_is_refused_before_any_work(tmp_path: Path) -> None:
    """Without it PairDistill on a pointwise teacher would fail at its first step, hours into a run."""
    with pytest.raises(RecipeError, match=r"pair_distill reads pairwise preferences.* name a pairwise teacher"):
        check_losses([LossSpec("pair_distill")])
    check_losses([LossSpec("pair_distill")], pairwise=True)
    with pytest.raises(RecipeError, match=r"layer_alignment needs layers"):
        Job().run(tmp_path, (LossSpec("layer_alignment"),))


def test_widths_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """Without it a teacher of another width would end in a trace from a matrix product."""
    job = Job("symmetric")
    job.data = replace(job.data, query_targets=np.zeros((24, 20), np.float32))
    with pytest.raises(RecipeError, match=r"embedding_regression .*\(16 wide\).*\(20 wide\).*student\.projection"):
        job.run(tmp_path)
    frozen = Job("asymmetric")
    frozen.data = replace(frozen.data, query_targets=np.zeros((24, 20), np.float32))
    with pytest.raises(RecipeError, match=r"16 wide and the frozen documents' 20; set student\.projection"):
        frozen.run(tmp_path, (LossSpec("listwise_kl"),))


def test_a_judged_document_in_another_list_needs_no_score(tmp_path: Path) -> None:
    """Without it a collection with several positives would end in-batch Margin-MSE in the middle of an epoch."""
    work = Job()
    every = {doc_id for item in work.data.lists for doc_id in item.doc_ids}
    first = work.data.lists[0]
    elsewhere = min(every - set(first.doc_ids))
    qrels = {**work.qrels, first.query_id: {**work.qrels[first.query_id], elsewhere: 1}}
    work.data = replace(work.data, qrels=qrels)
    work.run(tmp_path, [LossSpec("in_batch_margin_mse")], replace(SCHEDULE, batch_queries=24, epochs=1))
    assert events(tmp_path)[0]["loss"] > 0


def test_taid_around_an_in_batch_loss_trains(tmp_path: Path) -> None:
    """Without it the blend could stay where it starts, or reach only losses over lists."""
    spec = LossSpec("taid", teacher="encoder", options={"of": "tct", "start": 0.0, "student_temperature": 0.1})
    Job().run(tmp_path, [spec], SCHEDULE)
    found = [row["losses"]["taid"] for row in events(tmp_path)]
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert found[-1] > 1e-3
