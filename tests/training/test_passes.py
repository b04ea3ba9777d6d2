"""The boundary between encoders and losses: caching, micro-batches and precision change nothing but cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from training_jobs import EVERY_LOSS, LATE_INTERACTION, Case, Job, assert_equal, kinds, one_step, reranker

from retrieval_kd.encoders.static import StaticBody
from retrieval_kd.errors import RecipeError
from retrieval_kd.losses.registry import LOSSES
from retrieval_kd.recipes.schema import LossSpec, ScheduleSpec
from retrieval_kd.training.machine import Machine, sparse_token_gradients
from retrieval_kd.training.passes import Passes, Work


@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_cached_gradients_equal_uncached_ones_for_every_loss(mode: str, dropout: float) -> None:
    """Without it a large batch would train another model than a small memory could hold, or with other dropout."""
    plain = one_step(EVERY_LOSS, mode, dropout)
    cached = one_step(EVERY_LOSS, mode, dropout, gradient_cache=True)
    assert_equal(plain, cached, 1e-9)
    assert any(gradient.abs().max() > 1e-3 for gradient in plain[1].values())


@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    "case",
    [
        Case("joint", (LossSpec("joint_listwise"),), "", joint=True),
        Case("extra texts", (LossSpec("embedding_regression"),), "", extra=True),
        Case("late interaction", LATE_INTERACTION, ""),
    ],
    ids=lambda case: case.label,
)
def test_caching_reaches_all_who_take_part_in_a_step(case: Case, mode: str) -> None:
    """Without it a reranker that trains along, or texts beside the queries, could be cached away or drawn anew."""
    work = replace(case, mode=mode, sizes=(8, 4))
    plain, cached = (work.step(dropout=0.3, gradient_cache=cache) for cache in (False, True))
    assert_equal(plain, cached, 1e-9)
    assert any(name.startswith("joint.") for name in plain[1]) == case.joint


def test_no_term_of_the_matrix_is_at_rest() -> None:
    """Without it a term whose gradient is zero anyway could be lost by caching or by processes, and all stay green."""
    terms = {
        f"{spec}, joint {kind.joint}": replace(kind, losses=(spec,), mode="asymmetric")
        for kind in kinds()
        if kind.losses is not EVERY_LOSS
        for spec in kind.losses
    }
    assert len(terms) > 30
    for label, case in terms.items():
        loss, gradients = case.step()
        assert loss > 1e-3, label
        assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-3, label


def test_caching_keeps_no_activations() -> None:
    """Without it the cache would cost a second forward pass and save nothing."""
    saved: dict[bool, int] = {}
    for cached in (False, True):
        alive: list[int] = []
        passes = Passes(Machine(), max_tokens=8, cached=cached)
        layer = nn.Linear(4, 4)
        texts = torch.randn(32, 4)

        def pack(tensor: Tensor, alive: list[int] = alive) -> Tensor:
            alive.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            passes.run(Work([2] * 32, lambda rows, layer=layer, texts=texts: layer(texts[rows]).tanh()))
        saved[cached] = sum(alive)
    assert saved[False] > 0
    assert saved[True] == 0


@pytest.mark.parametrize("name", ["listwise_kl", "info_nce", "embedding_regression", "layer_alignment"])
def test_micro_batches_change_neither_loss_nor_gradients(name: str) -> None:
    """Without it the memory budget would be a hyper-parameter of quality."""
    job_losses = (LossSpec(name),)
    assert_equal(one_step(job_losses), one_step(job_losses, micro_tokens=10_000), 1e-9)


def test_gradients_by_row_equal_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a token that stands in two texts of a step, or in two micro-batches, could count once."""
    by_row = one_step(EVERY_LOSS, joint=True)
    monkeypatch.setattr("retrieval_kd.training.loop.sparse_token_gradients", lambda module: None)
    assert_equal(by_row, one_step(EVERY_LOSS, joint=True), 1e-9)


def test_token_tables_of_all_that_train_get_gradients_by_row() -> None:
    """Without it every micro-batch would clear and add a gradient as large as the vocabulary."""
    job = Job("asymmetric")
    static = StaticBody(torch.randn(9, 4), torch.ones(9))
    all_three = nn.ModuleDict({"student": job.student, "joint": reranker(job).module, "static": static})
    ids = torch.tensor([[1, 2], [2, 3]])
    dense = torch.autograd.grad(static(ids).square().sum(), [static.embeddings, static.weights])
    sparse_token_gradients(all_three)
    tables = [all_three["student"].body.embeddings.word_embeddings, all_three["joint"].bert.embeddings.word_embeddings]
    for table in tables:
        table(ids).sum().backward()
        assert table.weight.grad.is_sparse
    by_row = torch.autograd.grad(static(ids).square().sum(), [static.embeddings, static.weights])
    assert [gradient.is_sparse for gradient in by_row] == [True, False]
    for one, other in zip(dense, by_row, strict=True):
        assert torch.allclose(one, other.to_dense())


def test_activation_checkpointing_changes_no_gradient() -> None:
    """Without it a saved gigabyte would cost quality, or layers would be read twice."""
    assert_equal(
        one_step(EVERY_LOSS, dropout=0.3), one_step(EVERY_LOSS, dropout=0.3, activation_checkpointing=True), 1e-9
    )


def test_gradient_reaches_only_what_was_asked_for() -> None:
    """Without it a frozen copy would be trained, or the frozen documents of asymmetric mode."""
    passes = Passes(Machine(), max_tokens=100)
    layer = nn.Linear(3, 2)
    texts = torch.randn(5, 3)
    work = Work([1] * 5, lambda rows: layer(texts[rows]))
    frozen, live = passes.run(work, gradients=False), passes.run(work)
    assert torch.equal(frozen, live)
    assert not frozen.requires_grad
    (frozen * 7 + live).sum().backward()
    passes.backward()
    assert torch.allclose(layer.bias.grad, torch.full((2,), 5.0))  # type: ignore[arg-type]
    assert passes.texts == 5


def test_padding_is_counted() -> None:
    """Without it the report's share of padding could not be told from a full batch."""
    passes = Passes(Machine(), max_tokens=12)
    passes.run(Work([4, 1, 3, 2], lambda rows: torch.zeros(len(rows), 1)))
    assert (passes.tokens, passes.padded) == (10, 2 * 4 + 2 * 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is given as much at once as the budget allows")
def test_a_long_text_does_not_pad_the_short_ones() -> None:
    """Without it one long text of a step would make a CPU pay for its length as many times as there are texts."""
    passes = Passes(Machine(), max_tokens=1000)
    passes.run(Work([60] + [5] * 7, lambda rows: torch.zeros(len(rows), 1)))
    assert (passes.tokens, passes.padded) == (95, 95)


def test_half_precision_is_near_and_losses_stay_exact() -> None:
    """Without it bf16 could reach the similarities, whose differences it cannot hold."""
    losses = (LossSpec("listwise_kl"), LossSpec("info_nce"))
    exact, half = (one_step(losses, double=False, precision=p)[0] for p in ("fp32", "bf16"))
    assert half == pytest.approx(exact, rel=0.05)
    assert half != exact


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is of machines without a GPU")
def test_a_precision_the_device_lacks_is_refused() -> None:
    """Without it fp16 on a CPU would train in fp32 under another name, or crawl."""
    with pytest.raises(RecipeError, match=r"schedule\.precision: fp16 needs a GPU.*use fp32 or bf16"):
        Machine("fp16")


def test_the_matrix_has_every_loss() -> None:
    """Without it a loss added to the registry could leave these tests green and untested."""
    assert {spec.name for spec in EVERY_LOSS} == set(LOSSES)
    assert ScheduleSpec().gradient_cache is False
