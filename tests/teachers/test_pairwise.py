"""The pairwise ranker: probabilities of a reading order, comparisons that survive a kill, and that it learns."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval_kd.artifacts import Artifact
from retrieval_kd.errors import DataError
from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.recipes.schema import FineTuneSpec
from retrieval_kd.runs import Scores, Shortlist
from retrieval_kd.scores.preferences import PreferenceStore, aggregated, symmetrised
from retrieval_kd.scores.store import ScoreSource
from retrieval_kd.teachers.cross_encoder import PairwiseRanker
from retrieval_kd.teachers.fine_tune import fine_tune_ranker, pairwise_loss
from retrieval_kd.teachers.scoring import compare_candidates

from .conftest import ModelMaker, TinyCollection

LISTS = [CandidateList(f"q{i}", (f"d{i}", f"d{i + 10}", f"d{i + 20}", f"d{39 - i}"), (1, 0, 0, 0)) for i in range(10)]


class Longer:
    """Prefers the longer document, and a little what it reads first; dies when told to."""

    name = "longer"
    fingerprint = "longer"
    source = ScoreSource("longer", "r")

    def __init__(self, dies_after: int = 10**9) -> None:
        """Compare at most so many times."""
        self.left = dies_after
        self.seen: list[tuple[str, str, str]] = []

    def preferences(self, triples: list[tuple[str, str, str]], on_rows: object = None) -> Scores:
        """Return probabilities."""
        self.left -= len(triples)
        if self.left < 0:
            raise KeyboardInterrupt
        self.seen += triples
        return np.array([1 / (1 + np.exp((len(b) - len(a)) / 50 - 0.3)) for _, a, b in triples], np.float32)


def test_a_preference_is_the_probability_of_the_logit(make_model: ModelMaker, tiny: TinyCollection) -> None:
    """A raw logit stored as a preference would be refused at best; batches must not change it."""
    ranker = PairwiseRanker.load(str(make_model()), 60, activation="sigmoid")
    query, texts = tiny.queries()["q1"], list(tiny.contents([f"d{i}" for i in range(8)]).values())
    triples = [(query, first, second) for first, second in itertools.permutations(texts, 2)]
    together = ranker.preferences(triples)
    rows = ranker._tokenizer(triples)
    with torch.no_grad():
        logits = ranker._model(**ranker._tokenizer.batch(rows, torch.device("cpu"))).logits[:, 0]
    np.testing.assert_allclose(together, torch.sigmoid(logits).numpy(), atol=1e-5)
    alone = [ranker.preferences([triple])[0] for triple in triples[::9]]
    np.testing.assert_allclose(alone, together[::9], atol=1e-5)
    assert ranker.source.template.startswith("query, first, second")


def test_every_pair_is_compared_in_both_orders(tiny: TinyCollection, tmp_path: Path) -> None:
    """A model's liking for what it reads first cancels only if both orders were asked."""
    artifact = compare_candidates(Longer(), tiny, LISTS, tmp_path / "s", triples_per_shard=50)
    assert artifact.summary == {"comparisons": 120, "queries": 10}
    assert len(artifact.files) == 3
    texts = tiny.contents([f"d{i}" for i in range(40)])
    for item, raw in zip(LISTS, PreferenceStore.open(tmp_path / "s").find(LISTS), strict=True):
        assert (~np.isnan(raw)).sum() == 12
        both = symmetrised(raw)
        lengths = [len(texts[doc_id]) for doc_id in item.doc_ids]
        for i, j in itertools.permutations(range(4), 2):
            assert raw[i, j] + raw[j, i] > 1
            assert (both[i, j] > 0.5) == (lengths[i] > lengths[j]) or lengths[i] == lengths[j]
        best = int(aggregated(both, "mean").argmax())
        assert lengths[best] == max(lengths)


def test_drawn_comparisons_do_not_depend_on_the_other_lists(tiny: TinyCollection, tmp_path: Path) -> None:
    """A draw that moves when a query is added would compare everything again."""
    compare_candidates(Longer(), tiny, LISTS, tmp_path / "all", comparisons=5, seed=7)
    compare_candidates(Longer(), tiny, LISTS[4:], tmp_path / "some", comparisons=5, seed=7)
    every, some = PreferenceStore.open(tmp_path / "all"), PreferenceStore.open(tmp_path / "some")
    for one, other in zip(every.find(LISTS)[4:], some.find(LISTS[4:]), strict=True):
        np.testing.assert_array_equal(one, other)
        assert (~np.isnan(one)).sum() == 10
    assert len(every) == 100
    compare_candidates(Longer(), tiny, LISTS, tmp_path / "seed", comparisons=5, seed=8)
    drawn = [np.isnan(matrix) for matrix in every.find(LISTS)]
    assert any(
        (a != np.isnan(b)).any()
        for a, b in zip(drawn, PreferenceStore.open(tmp_path / "seed").find(LISTS), strict=True)
    )


@pytest.mark.parametrize(
    ("documents", "comparisons", "made"), [(8, 12, 12), (8, 3, 8), (4, 1, 4), (3, 1, 3), (2, 1, 1)]
)
def test_every_document_is_in_a_drawn_comparison(
    tiny: TinyCollection, tmp_path: Path, documents: int, comparisons: int, made: int
) -> None:
    """Without it documents that no draw met would get the score of an average one."""
    lists = [Shortlist(f"q{i % 10}", tuple(f"d{(i + 3 * j) % 40}" for j in range(documents))) for i in range(10)]
    for seed in range(10):
        folder = tmp_path / str(seed)
        compare_candidates(Longer(), tiny, lists, folder, comparisons, seed)
        for raw in PreferenceStore.open(folder).find(lists):
            known = ~np.isnan(raw)
            assert known.sum() == 2 * made
            assert known.sum(axis=1).min() >= min(2, documents - 1)
            # Whoever is reached in as many steps as there are documents.
            assert (np.linalg.matrix_power(known + np.eye(documents), documents) > 0).all()


def test_a_killed_comparison_goes_on(tiny: TinyCollection, tmp_path: Path) -> None:
    """A night of comparisons must not be lost to its last minute, nor a shard be compared twice."""
    with pytest.raises(KeyboardInterrupt):
        compare_candidates(Longer(dies_after=100), tiny, LISTS, tmp_path / "s", triples_per_shard=40)
    assert not (tmp_path / "s" / "manifest.json").exists()
    second = Longer()
    resumed = compare_candidates(second, tiny, LISTS, tmp_path / "s", triples_per_shard=40)
    assert len(second.seen) == 40
    whole = compare_candidates(Longer(), tiny, LISTS, tmp_path / "whole", triples_per_shard=40)
    assert [entry.sha256 for entry in resumed.files] == [entry.sha256 for entry in whole.files]


def test_unknown_ids_are_found_before_anything_is_compared(tiny: TinyCollection, tmp_path: Path) -> None:
    """An unknown id in the last list must not cost the hours before it."""
    ranker = Longer()
    for extra, message in (
        (CandidateList("q1", ("d1", "nowhere"), (1, 0)), "'nowhere'"),
        (CandidateList("nobody", ("d1", "d2"), (1, 0)), "no query 'nobody'"),
    ):
        with pytest.raises(DataError, match=message):
            compare_candidates(ranker, tiny, [*LISTS, extra], tmp_path / "s")
    with pytest.raises(DataError, match="no candidates"):
        compare_candidates(ranker, tiny, [], tmp_path / "s")
    assert ranker.seen == []


def test_pairwise_loss_golden() -> None:
    """Targets in the wrong turn would teach the ranker to prefer negatives in every other row."""
    scores = torch.tensor([2.0, -2.0, 0.0, 0.0])
    expected = np.log(1 + np.exp(-2)) + np.log(2)
    assert pairwise_loss(scores, [2, 2]).item() == pytest.approx(expected)
    assert pairwise_loss(scores, [4]).item() == pytest.approx(expected / 2)
    assert pairwise_loss(torch.tensor([-50.0, 50.0]), [2]).item() == pytest.approx(50)


def test_it_learns_which_is_the_positive(make_model: ModelMaker, tiny: TinyCollection, tmp_path: Path) -> None:
    """A ranker that learned its place in the row instead of relevance would be right half of the time."""
    start = make_model(
        "bare", labels=0, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    spec = FineTuneSpec(start=str(start), epochs=40, batch_queries=10, learning_rate=5e-3)
    artifact: Artifact = fine_tune_ranker("pairwise", tiny, LISTS, spec, 64, 13, tmp_path / "t")
    ranker = PairwiseRanker.load(str(artifact.path), 64, activation="sigmoid")
    compare_candidates(ranker, tiny, LISTS, tmp_path / "s")
    matrices = PreferenceStore.open(tmp_path / "s").find(LISTS)
    assert np.mean([matrix[0, 1:] for matrix in matrices]) > 0.7
    assert np.mean([matrix[1:, 0] for matrix in matrices]) < 0.3
    first = [aggregated(symmetrised(matrix), "bradley_terry").argmax() == 0 for matrix in matrices]
    assert np.mean(first) > 0.7
