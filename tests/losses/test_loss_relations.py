"""What must hold between losses, under changes that carry no meaning, and at limits."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from loss_cases import BATCH, LIST, PASSAGES, TRIPLES, _b, _t, gradient, random_inputs, value

from retrieval_kd.losses.inputs import EmbeddingInputs, InBatchInputs, PairInputs, ScoreInputs, StackInputs
from retrieval_kd.losses.registry import LOSSES
from retrieval_kd.losses.scaled import false_negatives, percentile_scale
from retrieval_kd.losses.stacks import layer_weights

OF_KIND = {
    kind: sorted(n for n, i in LOSSES.items() if i.kind == kind) for kind in ("scores", "in_batch", "embeddings")
}
FIXED_LEVEL = {"pointwise_mse", "denoised_info_nce"}


@pytest.mark.parametrize("name", sorted(set(OF_KIND["scores"]) - FIXED_LEVEL))
def test_shifting_a_students_list_changes_nothing(name: str) -> None:
    """Only differences within a list rank documents; a loss that sees the level trains something else."""
    inputs = random_inputs("scores")
    shifted = dataclasses.replace(inputs, student=inputs.student + torch.tensor([[3.0], [-2.0], [7.0]]))
    assert value(name, shifted).item() == pytest.approx(value(name, inputs).item(), rel=1e-10)


@pytest.mark.parametrize("name", sorted(set(OF_KIND["scores"]) - FIXED_LEVEL - {"scaled_listwise_kl"}))
def test_shifting_a_teachers_list_changes_nothing(name: str) -> None:
    """Cross-encoder logits have a per-query level that means nothing."""
    inputs = random_inputs("scores")
    shift = torch.tensor([[3.0], [-2.0], [7.0]])
    shifted = dataclasses.replace(inputs, teacher=inputs.teacher + shift, previous=inputs.previous + shift)
    assert value(name, shifted).item() == pytest.approx(value(name, inputs).item(), rel=1e-10)


@pytest.mark.parametrize("name", sorted(set(OF_KIND["in_batch"]) - {"passage_centric"}))
def test_shifting_a_query_in_the_batch_changes_nothing(name: str) -> None:
    """As above, for a query against the batch; only PAIR compares queries with each other."""
    inputs = random_inputs("in_batch")
    shifted = dataclasses.replace(inputs, student=inputs.student + torch.tensor([[3.0], [-2.0], [7.0]]))
    assert value(name, shifted).item() == pytest.approx(value(name, inputs).item(), rel=1e-9)


@pytest.mark.parametrize(
    "name", [n for n in OF_KIND["in_batch"] if "teacher" in LOSSES[n].needs and n not in FIXED_LEVEL]
)
def test_shifting_a_teachers_query_in_the_batch_changes_nothing(name: str) -> None:
    """Without it a loss over the batch could learn the level of a query's scores; denoising reads it, by its bounds."""
    inputs = random_inputs("in_batch")
    shifted = dataclasses.replace(inputs, teacher=inputs.teacher + torch.tensor([[3.0], [-2.0], [7.0]]))
    assert value(name, shifted).item() == pytest.approx(value(name, inputs).item(), rel=1e-10)


@pytest.mark.parametrize("name", OF_KIND["scores"])
def test_the_order_of_negatives_does_not_matter(name: str) -> None:
    """Candidates come in mining order; a loss that reads it would learn the miner."""
    inputs = random_inputs("scores", ragged=False)
    order = torch.tensor([0, 3, 1, 4, 2])
    fields = ("student", "teacher", "previous", "mask")
    moved = dataclasses.replace(inputs, **{f: getattr(inputs, f)[:, order] for f in fields})
    assert value(name, moved).item() == pytest.approx(value(name, inputs).item(), rel=1e-12)
    torch.testing.assert_close(gradient(name, moved), gradient(name, inputs)[:, order])


@pytest.mark.parametrize("name", OF_KIND["in_batch"])
def test_the_order_of_the_batchs_documents_does_not_matter(name: str) -> None:
    """Unique documents have no order, and several positives none among themselves."""
    inputs = random_inputs("in_batch")
    inputs = dataclasses.replace(inputs, positives=inputs.positives & inputs.listed & (torch.arange(7) != 6))
    order = torch.tensor([6, 3, 1, 4, 2, 0, 5])
    fields = ("student", "teacher", "scored", "listed", "positives", "mask")
    moved = {f: getattr(inputs, f)[:, order] for f in fields} | {"documents": inputs.documents[order][:, order]}
    assert value(name, dataclasses.replace(inputs, **moved)).item() == pytest.approx(
        value(name, inputs).item(), rel=1e-12
    )


@pytest.mark.parametrize("name", OF_KIND["embeddings"])
def test_the_order_and_frame_of_texts_does_not_matter(name: str) -> None:
    """Joint permutation of texts and joint rotation of both spaces leave vectors' relations as they are."""
    inputs = random_inputs("embeddings")
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    order = torch.tensor([2, 0, 3, 1])
    moved = EmbeddingInputs(
        student=inputs.student[order] @ turn, teacher=inputs.teacher[order] @ turn, bank=inputs.bank @ turn
    )
    assert value(name, moved).item() == pytest.approx(value(name, inputs).item(), rel=1e-10)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("margin_mse", {}),
        ("listwise_kl", {"student_temperature": 2.0, "teacher_temperature": 2.0}),
        ("listwise_kl", {"direction": "student_teacher"}),
        ("pointwise_mse", {}),
        ("learning_without_forgetting", {}),
        ("taid", {}),
    ],
)
def test_a_student_that_equals_its_teacher_is_done(name: str, options: dict[str, object]) -> None:
    """The fixed point of imitation: loss and gradient 0. PROD's regulariser starts every stage there."""
    inputs = random_inputs("scores")
    same = dataclasses.replace(inputs, teacher=inputs.student, previous=inputs.student)
    assert value(name, same, options).item() == pytest.approx(0.0, abs=1e-15)
    assert gradient(name, same, options).abs().max() < 1e-15


def test_margin_mse_is_not_scale_invariant_and_its_gradient_is_that_of_the_paper() -> None:
    """Gradients on positive and negative are opposite, 2 (delta_s - delta_t) / B."""
    inputs = ScoreInputs(
        student=_t([2, 1], [1, 1.5]), teacher=_t([10, 6], [8, 9]), mask=torch.ones(2, 2, dtype=torch.bool)
    )
    assert gradient("margin_mse", inputs).tolist() == [[-3.0, 3.0], [0.5, -0.5]]


def test_a_hot_temperature_turns_kl_into_squared_differences() -> None:
    """T^2 KL tends to sum (centred s - t)^2 / 2n: its gradient no longer depends on T."""
    options = {"student_temperature": 1e4, "teacher_temperature": 1e4, "square_temperature": True}
    assert value("listwise_kl", LIST, options).item() == pytest.approx(0.361111, abs=1e-4)


def test_a_certain_teacher_turns_kl_and_plackett_luce_into_cross_entropy() -> None:
    """The limit in which distillation is supervised learning."""
    inputs = random_inputs("scores")
    certain = torch.zeros_like(inputs.teacher)
    certain[:, 0] = 200.0
    inputs = dataclasses.replace(inputs, teacher=certain)
    for name in ("listwise_kl", "plackett_luce"):
        assert value(name, inputs).item() == pytest.approx(value("cross_entropy", inputs).item(), rel=1e-12)
        torch.testing.assert_close(gradient(name, inputs), gradient("cross_entropy", inputs))


def test_plackett_luce_with_flat_weights_is_list_mle() -> None:
    """A hot teacher weighs all places alike, where the positive is also the teacher's first."""
    inputs = random_inputs("scores", ragged=False)
    teacher = inputs.teacher.clone()
    teacher[:, 0] = 9.0
    inputs = dataclasses.replace(inputs, teacher=teacher)
    hot = value("plackett_luce", inputs, {"teacher_temperature": 1e9}).item()
    assert hot * 5 == pytest.approx(value("list_mle", inputs).item(), rel=1e-6)


def test_plackett_luce_of_a_flat_student() -> None:
    """Each place is uniform over what is left: sum of alpha_k log(C - k + 1)."""
    flat = dataclasses.replace(LIST, student=torch.zeros(1, 3, dtype=torch.float64))
    alpha = torch.softmax(_t([2.0, 1.0, 0.0])[0], 0)
    expected = alpha[0] * math.log(3) + alpha[1] * math.log(2)
    assert value("plackett_luce", flat).item() == pytest.approx(expected.item())


def test_plackett_luce_puts_the_positive_first_against_the_teacher() -> None:
    """A teacher that prefers a negative changes the weights, not the first place."""
    wrong = dataclasses.replace(LIST, teacher=_t([0.0, 5.0, 1.0]), student=_t([10.0, 0.0, -10.0]))
    ordered = dataclasses.replace(wrong, student=_t([0.0, 10.0, -10.0]))
    assert value("plackett_luce", wrong) < value("plackett_luce", ordered)


def test_ranknet_counts_every_pair_and_has_the_right_sign() -> None:
    """Zero scores give log 2 a pair; the teacher's order is the least, its reverse (the paper's misprint) the most."""
    flat = dataclasses.replace(LIST, student=torch.zeros(1, 3, dtype=torch.float64))
    assert value("ranknet", flat).item() == pytest.approx(math.log(2))
    assert value("ranknet", flat, {"reduction": "sum"}).item() == pytest.approx(3 * math.log(2))
    right = dataclasses.replace(LIST, student=50 * LIST.teacher)
    reverse = dataclasses.replace(LIST, student=-50 * LIST.teacher)
    assert value("ranknet", right).item() < 1e-9
    assert value("ranknet", reverse).item() > 40


def test_pair_term_has_the_gradient_of_soft_ranknet_and_rests_at_the_logit() -> None:
    """KL of two classes is binary cross-entropy less a constant; p = .5 leaves equal scores alone."""
    inputs = random_inputs("pairs")
    student = inputs.student.clone().requires_grad_()
    delta = student.unsqueeze(2) - student.unsqueeze(1)
    F.binary_cross_entropy_with_logits(delta[inputs.compared], inputs.preferences[inputs.compared]).backward()
    torch.testing.assert_close(gradient("pair_distill", inputs), student.grad)

    def pair(p: float, gap: float) -> PairInputs:
        return PairInputs(
            student=_t([gap, 0.0]),
            mask=_b([1, 1]),
            preferences=torch.full((1, 2, 2), p, dtype=torch.float64),
            compared=torch.tensor([[[False, True], [False, False]]]),
        )

    for p, gap in ((0.8, math.log(4)), (0.5, 0.0)):
        assert value("pair_distill", pair(p, gap)).item() == pytest.approx(0.0, abs=1e-15)
        assert gradient("pair_distill", pair(p, gap)).abs().max() < 1e-15
    none = dataclasses.replace(pair(0.8, 1.0), compared=torch.zeros(1, 2, 2, dtype=torch.bool))
    assert value("pair_distill", none).item() == 0.0


def test_certain_preferences_cost_no_nan() -> None:
    """P of exactly 0 and 1 has entropy 0 log 0."""
    inputs = random_inputs("pairs")
    certain = dataclasses.replace(inputs, preferences=inputs.preferences.round())
    assert torch.isfinite(gradient("pair_distill", certain)).all()


def test_rocketqav2_mean_is_batchmean_over_length_and_detaching_leaves_the_labels() -> None:
    """The code's reduction is 1/L of the paper's; a detached reranker learns from its labels alone."""
    inputs = random_inputs("scores", ragged=False)
    labels = value("cross_entropy", dataclasses.replace(inputs, student=inputs.teacher))
    summed, mean = (value("joint_listwise", inputs, {"reduction": r}) - labels for r in ("batchmean", "mean"))
    assert mean.item() == pytest.approx(summed.item() / 5)
    teacher = inputs.teacher.clone().requires_grad_()
    value("joint_listwise", dataclasses.replace(inputs, teacher=teacher), {"detach_teacher": True}).backward()
    torch.testing.assert_close(
        teacher.grad, gradient("cross_entropy", dataclasses.replace(inputs, student=inputs.teacher))
    )


def test_a_temperature_of_the_joint_teacher_leaves_its_labels_alone() -> None:
    """It softens what the student sees; in the cross-entropy it would train the reranker to logits as much larger."""
    inputs, options = random_inputs("scores"), {"teacher_temperature": 3.0}
    labels = value("cross_entropy", dataclasses.replace(inputs, student=inputs.teacher))
    assert value("joint_listwise", inputs, options).item() == pytest.approx(
        (labels + value("listwise_kl", inputs, options)).item()
    )


def test_taid_starts_with_no_gradient_and_ends_as_kl() -> None:
    """At blend 0 the target is the student itself; at 1 the teacher; in between a constant."""
    inputs = random_inputs("scores")
    start = dataclasses.replace(inputs, blend=torch.tensor(0.0))
    assert gradient("taid", start, {"student_temperature": 0.1}).abs().max() < 1e-15
    end = dataclasses.replace(inputs, blend=torch.tensor(1.0))
    options = {"student_temperature": 0.1, "teacher_temperature": 2.0}
    torch.testing.assert_close(gradient("taid", end, options), gradient("listwise_kl", inputs, options))
    half = dataclasses.replace(inputs, teacher=(inputs.student + inputs.teacher) / 2)
    torch.testing.assert_close(gradient("taid", inputs), gradient("listwise_kl", half))


AROUND = [
    ("listwise_kl", {"direction": "student_teacher", "student_temperature": 0.5, "teacher_temperature": 2.0}),
    ("prod", {"student_scale": 3.0, "teacher_scale": 2.0}),
    ("scaled_listwise_kl", {"low": -1.0, "high": 2.0, "student_temperature": 0.5}),
    ("tct", {"student_temperature": 0.5, "gamma": 0.3}),
]


@pytest.mark.parametrize(("name", "options"), AROUND)
def test_taid_around_a_loss_moves_its_target_alone(name: str, options: dict[str, object]) -> None:
    """At blend 1 it is that loss; at 0 only the labels pull, whatever scale either side's scores have."""
    inputs, around = random_inputs(LOSSES[name].kind), {"of": name, **options}
    start, end = (dataclasses.replace(inputs, blend=torch.tensor(blend)) for blend in (0.0, 1.0))
    assert value("taid", end, around).item() == pytest.approx(value(name, inputs, options).item(), rel=1e-12)
    torch.testing.assert_close(gradient("taid", end, around), gradient(name, inputs, options))
    labels = torch.zeros_like(inputs.student)
    if name == "prod":
        scaled = dataclasses.replace(inputs, student=3.0 * inputs.student)
        labels = 0.1 * 3.0 * gradient("cross_entropy", scaled)
    if name == "tct":
        labels = 0.3 * gradient("info_nce", inputs, {"temperature": 0.5})
    torch.testing.assert_close(gradient("taid", start, around), labels, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), AROUND)
def test_taid_around_a_loss_does_not_see_the_level_of_scores(name: str, options: dict[str, object]) -> None:
    """The blend adds both sides' levels, which mean nothing."""
    inputs, around = random_inputs(LOSSES[name].kind), {"of": name, **options}
    shift = torch.tensor([[3.0], [-2.0], [7.0]])
    moved = dataclasses.replace(inputs, student=inputs.student + shift)
    if name != "scaled_listwise_kl":
        moved = dataclasses.replace(moved, teacher=inputs.teacher - 2 * shift)
    assert value("taid", moved, around).item() == pytest.approx(value("taid", inputs, around).item(), rel=1e-10)


def test_soft_nearest_neighbour_with_one_positive_is_info_nce() -> None:
    """And with several, positives help each other: the released code makes them negatives."""
    inputs = random_inputs("in_batch")
    one = dataclasses.replace(inputs, positives=inputs.positives & (torch.arange(7) != 6))
    assert value("soft_nearest_neighbour", one).item() == pytest.approx(value("info_nce", one).item(), rel=1e-12)
    assert gradient("soft_nearest_neighbour", inputs)[inputs.positives].max() <= 0


def test_partial_plackett_luce_of_two_documents_is_bradley_terry() -> None:
    """Without a rest of the batch only the preference is left: log(1 + exp(s- - s+))."""
    two = InBatchInputs(
        student=_t([0.3, 0.7]), teacher=_t([2, 1]), scored=_b([1, 1]), positives=_b([1, 0]), mask=_b([1, 1])
    )
    found = value("partial_plackett_luce", two, {"temperature": 1.0}).item()
    assert found == pytest.approx(math.log1p(math.exp(0.4)), rel=1e-12)


def test_partial_plackett_luce_of_one_scored_document_is_info_nce() -> None:
    """One preferred document and the batch below it."""
    inputs = random_inputs("in_batch")
    positives = inputs.positives & (torch.arange(7) != 6)
    one = dataclasses.replace(inputs, positives=positives, scored=positives)
    assert value("partial_plackett_luce", one).item() == pytest.approx(value("info_nce", one).item(), rel=1e-12)


def test_partial_plackett_luce_of_everything_scored_is_list_mle() -> None:
    """With depth 0 and no rest the whole order counts."""
    inputs = random_inputs("in_batch", ragged=False)
    full = dataclasses.replace(inputs, scored=torch.ones_like(inputs.mask))
    lists = ScoreInputs(student=inputs.student, teacher=inputs.teacher, mask=inputs.mask)
    found = value("partial_plackett_luce", full, {"temperature": 1.0, "depth": 0}).item()
    assert found == pytest.approx(value("list_mle", lists).item(), rel=1e-12)


def test_info_nce_limits() -> None:
    """A hot temperature leaves log of the number of documents; an easy negative costs nothing."""
    assert value("info_nce", BATCH, {"temperature": 1e9}).item() == pytest.approx(math.log(3))
    assert value("info_nce", BATCH, {"temperature": 1e-3}).item() == pytest.approx(0.0, abs=1e-12)


def test_tct_rests_where_the_student_is_the_sharpened_teacher() -> None:
    """Default teacher temperature .25 against the student's 1."""
    inputs = random_inputs("in_batch")
    same = dataclasses.replace(inputs, student=inputs.teacher / 0.25)
    assert value("tct", same).item() == pytest.approx(0.0, abs=1e-14)
    assert gradient("tct", same).abs().max() < 1e-14


def test_false_negatives_are_exactly_those_above_the_threshold() -> None:
    """A bound on the wrong side would drop the easy negatives and keep the false ones."""
    teacher = _t([1.0, 0.61, 0.6, 0.1, 0.9])
    dropped = false_negatives(teacher, _b([1, 1, 1, 1, 0]), _b([1, 0, 0, 0, 0]), 0.6, 0.0, 1.0)
    assert dropped.tolist() == [[False, True, False, False, False]]


def test_percentile_scaling_clips_and_is_idempotent() -> None:
    """Scaling twice must not sharpen the teacher twice."""
    once = percentile_scale(_t([-9.0, 0.0, 2.0, 3.0, 30.0]), -1.0, 3.0)
    assert once.tolist() == [[0.0, 0.25, 0.75, 1.0, 1.0]]
    assert torch.equal(percentile_scale(once, 0.0, 1.0), once)


def test_passage_centric_in_batch_takes_other_queries_and_nobodys_positives() -> None:
    """The released denominator: for query 0 its lists' negatives 2 and 3 and the other query, not positive 1."""
    options = {"negatives": "documents_and_queries"}
    first = math.log1p((math.exp(0.2) + math.exp(0.4) + math.exp(0.0)) / math.exp(0.9))
    second = math.log1p((math.exp(0.6) + math.exp(0.0) + math.exp(0.0)) / math.exp(0.8))
    assert value("passage_centric", TRIPLES, options).item() == pytest.approx((first + second) / 2)
    mixed = 0.9 * value("info_nce", PASSAGES, {"temperature": 1.0}) + 0.1 * value("passage_centric", PASSAGES)
    assert mixed.item() == pytest.approx(0.393804, abs=1e-6)


def test_distributed_margins_are_the_mean_of_adaptive_ones_over_targets() -> None:
    """Broadcasting along the other axis gives another loss with the same shape."""
    inputs = random_inputs("in_batch")
    first = inputs.positives.int().argmax(1)
    found = []
    for row in range(3):
        documents = inputs.documents.clone()
        documents[first] = inputs.documents[first[row]]
        found.append(value("adaptive_margin", dataclasses.replace(inputs, documents=documents), {"target": "adaptive"}))
    assert value("adaptive_margin", inputs).item() == pytest.approx(sum(found).item() / 3, rel=1e-12)


def test_identical_documents_ask_for_the_largest_margin() -> None:
    """As published: cos(d+, d-) = 1 sets the target to 1 where the margin is 0."""
    same = dataclasses.replace(PASSAGES, student=_t([0.4, 0.4]), documents=torch.ones(2, 2, dtype=torch.float64))
    assert value("adaptive_margin", same).item() == pytest.approx(1.0)


def test_squared_distance_is_twice_the_cosine_loss_on_the_sphere() -> None:
    """LEAF's two published forms are one up to a factor."""
    inputs = random_inputs("embeddings")
    unit = EmbeddingInputs(student=F.normalize(inputs.student), teacher=F.normalize(inputs.teacher))
    squared, cosine = (value("embedding_regression", unit, {"kind": k}).item() for k in ("squared_l2", "cosine"))
    assert squared == pytest.approx(2 * cosine)


def test_a_vector_on_its_target_gets_no_nan() -> None:
    """The root of a squared distance has no slope at 0."""
    inputs = random_inputs("embeddings")
    same = dataclasses.replace(inputs, student=inputs.teacher.clone())
    for kind in ("squared_l2", "l2", "cosine"):
        assert value("embedding_regression", same, {"kind": kind}).item() == pytest.approx(0.0, abs=1e-15)
        assert gradient("embedding_regression", same, {"kind": kind}).abs().max() < 1e-12


def test_contrastive_kd_limits() -> None:
    """Orthonormal vectors among N others: log(1 + N e^(-1/tau)); hot: log(N + 1)."""
    eye = torch.eye(6, dtype=torch.float64)
    inputs = EmbeddingInputs(student=3 * eye[:1], teacher=eye[:1], bank=5 * eye[1:])
    expected = math.log(1 + 5 * math.exp(-2))
    assert value("contrastive_kd", inputs, {"temperature": 0.5}).item() == pytest.approx(expected)
    assert value("contrastive_kd", inputs, {"temperature": 1e9}).item() == pytest.approx(math.log(6))


def test_contrastive_kd_takes_no_text_for_its_own_negative() -> None:
    """A bank longer than an epoch holds each text's own vector; as a negative it would weaken the pull towards it."""
    inputs = random_inputs("embeddings")
    assert inputs.bank is not None
    alone = dataclasses.replace(inputs, student=inputs.student[:1], teacher=inputs.teacher[:1])
    banked = dataclasses.replace(alone, bank=torch.cat([2 * alone.teacher, inputs.bank, alone.teacher]))
    twice = dataclasses.replace(alone, student=alone.student.repeat(2, 1), teacher=alone.teacher.repeat(2, 1))
    expected = value("contrastive_kd", alone).item()
    for same in (banked, twice):
        assert value("contrastive_kd", same).item() == pytest.approx(expected, abs=1e-12)
    # To other texts it is a negative, wherever it lies.
    warm = {"temperature": 1.0}
    more = value("contrastive_kd", dataclasses.replace(inputs, bank=banked.bank), warm)
    assert more.item() > value("contrastive_kd", inputs, warm).item() + 0.1


def test_relations_survive_rotation_shift_and_scale_into_another_width() -> None:
    """Relational losses compare geometry alone."""
    teacher = random_inputs("embeddings").teacher
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q[:3]
    inputs = EmbeddingInputs(student=0.3 * teacher @ turn + 2.0, teacher=teacher)
    for name in ("relational_distance", "relational_angle"):
        assert value(name, inputs).item() == pytest.approx(0.0, abs=1e-20)


@pytest.mark.parametrize("name", ["relational_distance", "relational_angle"])
def test_duplicate_texts_give_no_nan_in_relations(name: str) -> None:
    """A text twice in a batch has distance 0 to itself: no angle, and a root without slope."""
    inputs = random_inputs("embeddings")
    for side in ("student", "teacher"):
        vectors = getattr(inputs, side).clone()
        vectors[1] = vectors[0]
        twice = dataclasses.replace(inputs, **{side: vectors})
        assert torch.isfinite(value(name, twice))
        assert gradient(name, twice).abs().max() < 1e3
    same = EmbeddingInputs(student=torch.ones(3, 2), teacher=torch.ones(3, 4))
    assert not gradient(name, same).any()


def test_layers_that_find_the_positive_weigh_more() -> None:
    """LEAD's weights sum to 1, are uniform for equal layers and follow -CE / 10."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    weights = layer_weights(torch.stack([_t([9.0, 0, 0]), _t([0.0, 9, 0])]), mask, 10.0)
    assert weights.sum().item() == pytest.approx(1.0)
    assert (weights[0] / weights[1]).item() == pytest.approx(math.exp(0.9))
    assert layer_weights(torch.stack([_t([1.0, 2, 0])] * 4), mask, 10.0).tolist() == pytest.approx([0.25] * 4)


def test_heads_that_agree_learn_nothing_from_their_mean() -> None:
    """The mean ensemble rests where heads agree up to a shift."""
    head = random_inputs("scores").student
    stack = StackInputs(student=torch.stack([head, head + 3, head - 1]), mask=random_inputs("scores").mask)
    assert value("self_distillation", stack, {"ensemble": "mean"}).item() == pytest.approx(0.0, abs=1e-15)
    assert value("self_distillation", stack).item() > 0.01


def test_lambdarank_leaves_a_swap_below_the_cutoff_alone() -> None:
    """nDCG@1 does not change when ranks 2 and 3 swap."""
    inputs = dataclasses.replace(LIST, student=_t([5.0, 1.0, 0.0]))
    below = gradient("lambdarank", inputs, {"cutoff": 1})
    assert below[0, 1].item() > 0
    only = dataclasses.replace(inputs, teacher=_t([2.0, 0.0, 0.5]))
    pair_free = value("lambdarank", only, {"cutoff": 1, "scale": 1.0}).item()
    expected = 1.0 * math.log1p(math.exp(-4)) + 0.75 * math.log1p(math.exp(-5))
    assert pair_free == pytest.approx(expected)


def test_lambdarank_exponential_gain_is_that_of_ndcg() -> None:
    """Grades 2 and 0 in the wrong order: gain 3 at rank 2, ideal 3, so the swap costs 1 - 1/log2(3)."""
    inputs = ScoreInputs(student=_t([0.0, 1.0]), teacher=_t([2.0, 0.0]), mask=_b([1, 1]))
    expected = (1 - 1 / math.log2(3)) * math.log1p(math.e)
    assert value("lambdarank", inputs, {"gain": "exponential"}).item() == pytest.approx(expected)
