"""Extra texts in the loop: which are drawn when, and who reads them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_jobs import SCHEDULE, Job, curve, extra_texts

from retrieval_kd.errors import DataError
from retrieval_kd.recipes.schema import LossSpec
from retrieval_kd.training.batches import ExtraTexts
from retrieval_kd.training.terms import Terms

REGRESSION = (LossSpec("embedding_regression"),)


def extra(count: int, batch: int) -> ExtraTexts:
    return ExtraTexts({f"x/{i}": f"w{i}" for i in range(count)}, np.eye(count, 16, dtype=np.float32), batch)


def job_with_texts() -> Job:
    work = Job()
    work.data = replace(work.data, extra=extra_texts(work))
    return work


def test_every_text_is_drawn_as_often_as_every_other() -> None:
    """Without it some texts could be left out for good, or a resumed run could see others than an uninterrupted one."""
    texts = extra(10, 4)
    drawn = list(itertools.chain.from_iterable(texts.positions(7, step).tolist() for step in range(10)))
    passes = [drawn[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1]
    assert texts.positions(7, 5).tolist() == drawn[20:24]
    assert texts.positions(8, 0).tolist() != drawn[:4]


def test_an_order_is_drawn_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it each text of a step would draw an order of all: with 240,000 of them as long as the step itself."""
    drawn: list[object] = []
    original = np.random.default_rng

    def counted(seed: object) -> np.random.Generator:
        drawn.append(seed)
        return original(seed)  # type: ignore[arg-type]

    monkeypatch.setattr(np.random, "default_rng", counted)
    for step in range(10):
        extra(20, 4).positions(12345, step)
    assert drawn == [[12345, 0, 1], [12345, 1, 1]]


def test_a_batch_larger_than_the_texts_goes_round() -> None:
    """Without it a small collection of texts would be an index error in the first step."""
    assert sorted(extra(3, 6).positions(1, 0).tolist()) == [0, 0, 1, 1, 2, 2]


def test_only_embedding_losses_read_them(tmp_path: Path) -> None:
    """Without it texts that no document answers could stand in a score loss as queries without a positive."""
    listwise = (LossSpec("listwise_kl"),)
    with_texts, without = job_with_texts(), Job()
    with_texts.run(tmp_path / "a", listwise)
    without.run(tmp_path / "b", listwise)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    job_with_texts().run(tmp_path / "c", REGRESSION)
    Job().run(tmp_path / "d", REGRESSION)
    assert curve(tmp_path / "c") != curve(tmp_path / "d")


def test_the_loss_is_the_mean_over_queries_and_texts() -> None:
    """Without it an extra text could weigh more or less than a query."""
    from test_terms import a_step, vectors

    step = a_step(documents_live=False)
    own, target = vectors(3, 6, seed=20), vectors(3, 6, seed=21)
    own, target = own[:, : step.queries.shape[1]], target[:, : step.queries.shape[1]]
    terms = Terms(REGRESSION, {step.queries.shape[1]: 1.0})
    found = terms(replace(step, extra=(own, target)))["embedding_regression"]
    distances = torch.cat([step.queries - step.query_targets, own - target]).square().sum(1)
    assert found == pytest.approx(float(distances.mean()), rel=1e-12)


def test_a_resumed_run_goes_on_with_the_next_texts(tmp_path: Path) -> None:
    """Without it a killed run would start the texts anew and no longer be the run it was."""

    class Killed(Exception):
        pass

    whole = job_with_texts()
    whole.run(tmp_path / "whole", REGRESSION)
    broken = job_with_texts()
    positions, seen = ExtraTexts.positions, []

    def dies(self: ExtraTexts, seed: int, step: int) -> object:
        seen.append(step)
        if step == 5 and len(seen) == 6:
            raise Killed
        return positions(self, seed, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExtraTexts, "positions", dies)
        with pytest.raises(Killed):
            broken.run(tmp_path / "broken", REGRESSION, SCHEDULE)
    again = job_with_texts()
    again.run(tmp_path / "broken", REGRESSION, SCHEDULE)
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")


def test_an_id_of_a_query_is_refused() -> None:
    """Without it a text would be encoded as the query of the same id and regressed onto another text's vector."""
    work = Job()
    query_id = next(iter(work.texts.query_texts))
    with pytest.raises(DataError, match=query_id):
        replace(work.data, extra=ExtraTexts({query_id: "w1"}, np.eye(1, 16, dtype=np.float32), 1))
