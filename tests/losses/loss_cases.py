"""Inputs that every test of the losses shares: random batches of each kind, and golden numbers by hand."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from math import log, sqrt
from typing import Any

import torch
from torch import Tensor

from retrieval_kd.losses.inputs import EmbeddingInputs, InBatchInputs, Inputs, PairInputs, ScoreInputs, StackInputs
from retrieval_kd.losses.registry import bind, loss_info


def value(name: str, inputs: Inputs, options: dict[str, Any] | None = None) -> Tensor:
    return bind(name, options or {})(*loss_info(name, options or {}).arguments(inputs))


def gradient(name: str, inputs: Inputs, options: dict[str, Any] | None = None) -> Tensor:
    student = inputs.student.detach().clone().requires_grad_()
    value(name, dataclasses.replace(inputs, student=student), options).backward()
    assert student.grad is not None
    return student.grad


def random_inputs(kind: str, *, seed: int = 0, ragged: bool = True, dtype: torch.dtype = torch.float64) -> Inputs:
    """Return a small random batch: cosine-like student scores in -1..1, teacher scores of spread 2, no ties."""
    g = torch.Generator().manual_seed(seed)

    def student(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=dtype) * 2 - 1

    def teacher(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype) * 2

    mask = torch.ones(3, 5, dtype=torch.bool)
    if ragged:
        mask[0, 4:] = False
        mask[2, 2:] = False
    first = torch.zeros_like(mask)
    first[:, 0] = True
    blend = torch.tensor(0.5, dtype=dtype)
    if kind == "scores":
        lists = {"mask": mask, "positives": first, "blend": blend}
        return ScoreInputs(student=student(3, 5), teacher=teacher(3, 5), previous=teacher(3, 5), **lists)
    if kind == "pairs":
        compared = mask.unsqueeze(2) & mask.unsqueeze(1) & (torch.rand(3, 5, 5, generator=g) < 0.6)
        preferences = torch.rand(3, 5, 5, generator=g, dtype=dtype)
        return PairInputs(student=student(3, 5), mask=mask, preferences=preferences, compared=compared)
    if kind == "stacks":
        return StackInputs(student=student(3, 3, 5), mask=mask, teacher=teacher(3, 3, 5), positives=first)
    if kind == "embeddings":
        return EmbeddingInputs(student=student(4, 3), teacher=student(4, 3), bank=student(5, 3))
    positives = torch.zeros(3, 7, dtype=torch.bool)
    positives[torch.arange(3), torch.tensor([0, 2, 4])] = True
    positives[0, 6] = True
    listed = positives.clone()
    listed[torch.arange(3), torch.tensor([1, 3, 5])] = True
    scored = listed.clone()
    scored[1, 0] = True
    allowed = torch.ones(3, 7, dtype=torch.bool)
    if ragged:
        allowed[1, 6] = False
        allowed[2, 1] = False
    documents = student(7, 7)
    return InBatchInputs(
        student=student(3, 7),
        positives=positives,
        mask=allowed,
        teacher=teacher(3, 7),
        scored=scored,
        listed=listed,
        documents=(documents + documents.T) / 2,
        blend=blend,
    )


@dataclass(frozen=True)
class Golden:
    """One loss, one input, the number it must give."""

    name: str
    inputs: Inputs
    expected: float
    options: dict[str, Any] = field(default_factory=dict)


def _t(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _b(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


HALF = torch.tensor(0.5)
S, T = [1.0, 0.5, -0.5], [2.0, 0.0, 1.0]
LIST = ScoreInputs(
    student=_t(S),
    teacher=_t(T),
    previous=_t(T),
    blend=torch.tensor(1.0),
    mask=torch.ones(1, 3, dtype=torch.bool),
    positives=_b([1, 0, 0]),
)
TWO_POSITIVES = dataclasses.replace(LIST, positives=_b([1, 1, 0]))
BATCH = InBatchInputs(
    student=_t(S), teacher=_t(T), positives=_b([1, 0, 0]), scored=_b([1, 1, 1]), mask=torch.ones(1, 3, dtype=torch.bool)
)
TWO_MARGINS = ScoreInputs(
    student=_t([2, 1], [1, 1.5]), teacher=_t([10, 6], [8, 9]), mask=torch.ones(2, 2, dtype=torch.bool)
)
PAIR = PairInputs(
    student=_t([0.3, 0.0]),
    mask=_b([1, 1]),
    preferences=torch.tensor([[[0.0, 0.8], [0.0, 0.0]]], dtype=torch.float64),
    compared=torch.tensor([[[False, True], [False, False]]]),
)
PASSAGES = InBatchInputs(
    student=_t([0.8, 0.0]),
    positives=_b([1, 0]),
    listed=_b([1, 1]),
    mask=_b([1, 1]),
    documents=_t([1.0, 0.6], [0.6, 1.0]),
)
R = sqrt(0.5)
ARM = dataclasses.replace(PASSAGES, student=_t([R, 0.0]), documents=_t([1.0, R], [R, 1.0]))
# Two triples: margins .5 and .1; targets .6 and .7 of positive 0, .8 and .5 of positive 1, for negatives 2 and 3.
TRIPLES = InBatchInputs(
    student=_t([0.9, 0.0, 0.4, 0.0], [0.0, 0.8, 0.0, 0.7]),
    positives=_b([1, 0, 0, 0], [0, 1, 0, 0]),
    listed=_b([1, 0, 1, 0], [0, 1, 0, 1]),
    mask=torch.ones(2, 4, dtype=torch.bool),
    documents=_t([1.0, 0.0, 0.2, 0.4], [0.0, 1.0, 0.6, 0.0], [0.2, 0.6, 1.0, 0.0], [0.4, 0.0, 0.0, 1.0]),
)
EYE = torch.eye(4, dtype=torch.float64)
VECTORS = EmbeddingInputs(student=_t([1, 0], [0, 1]), teacher=_t([0, 1], [0, 1]))
LINE = EmbeddingInputs(student=_t([0.0], [1.0], [3.0]), teacher=_t([0.0, 0.0], [0.0, 1.0], [0.0, 2.0]))
CORNER = EmbeddingInputs(student=_t([0, 0], [1, 0], [0, 1]), teacher=_t([0.0], [1.0], [2.0]))
LAYERS = StackInputs(
    student=torch.stack([_t(S), _t(T)]), teacher=torch.stack([_t(T), _t(T)]), mask=LIST.mask, positives=LIST.positives
)
# At temperature .5 the teacher's second layer is 1/2, 1/4, 1/4 on the positive and on; its first is flat on both sides.
TEMPERED = StackInputs(
    student=torch.zeros(2, 1, 3, dtype=torch.float64),
    teacher=torch.stack([_t([0.0, 0.0, 0.0]), _t([log(2) / 2, 0.0, 0.0])]),
    mask=LIST.mask,
    positives=LIST.positives,
)
HEADS = StackInputs(student=torch.stack([_t(S)] * 3), mask=LIST.mask)
ONE = {"temperature": 1.0}
UNIT = {"student_temperature": 1.0, "teacher_temperature": 1.0}


def _kl_options(temperature: float) -> dict[str, Any]:
    return {
        "student_temperature": temperature,
        "teacher_temperature": temperature,
        "square_temperature": True,
    }


GOLDEN = [
    Golden("margin_mse", TWO_MARGINS, 4.625),
    Golden("margin_mse", TWO_MARGINS, 2.0, {"scale": 2.0}),  # margins 2, -1 against 4, -1
    Golden("in_batch_margin_mse", dataclasses.replace(BATCH, student=_t([2, 1, 1.5]), teacher=_t([10, 6, 9])), 4.625),
    # The first positive has no score: margins of the second, 1 - 3 against 4 - 7, over the one negative.
    Golden(
        "in_batch_margin_mse",
        dataclasses.replace(
            BATCH, student=_t([2, 1, 3]), teacher=_t([9, 4, 7]), positives=_b([1, 1, 0]), scored=_b([0, 1, 1])
        ),
        1.0,
    ),
    Golden("listwise_kl", LIST, 0.183843),
    Golden("listwise_kl", LIST, 0.239748, {"direction": "student_teacher"}),
    Golden("listwise_kl", LIST, 0.183843 / 3, {"reduction": "mean"}),
    Golden("listwise_kl", LIST, 0.319094, _kl_options(4.0)),
    Golden("listwise_kl", LIST, 0.357999, _kl_options(50.0)),
    Golden("cross_entropy", LIST, 0.604131),
    Golden("cross_entropy", TWO_POSITIVES, 0.201413),  # log(1 + exp(-1.5)), the other positive left out
    Golden("ranknet", LIST, (0.474077 + 0.201413 + 1.313262) / 3),
    Golden("ranknet", LIST, 2 * 0.474077 + 0.201413 + 1.313262, {"weighting": "margin", "reduction": "sum"}),
    Golden("lambdarank", LIST, (0.369070 * 0.474077 + 0.25 * 0.201413 + 0.065465 * 1.313262) / 1.315465),
    Golden("lambdarank", LIST, 1.0 * 0.474077 + 0.5 * 0.201413, {"cutoff": 1}),
    Golden("list_mle", LIST, 0.604131 + 1.313262),
    Golden("plackett_luce", LIST, 0.723285),
    Golden("pointwise_mse", LIST, 3.5 / 3),
    Golden("pointwise_mse", LIST, 10 / 3, {"scale": 2.0, "shift": -1.0}),  # 1, 0, -2 against 2, 0, 1
    Golden(
        "scaled_listwise_kl",
        LIST,
        0.183843,
        {"low": 0.0, "high": 2.0, "student_temperature": 1.0, "teacher_temperature": 0.5},
    ),
    Golden("joint_listwise", LIST, 0.407606 + 0.183843),
    Golden("joint_listwise", TWO_POSITIVES, 0.313262 + 0.183843),
    Golden("prod", LIST, 0.1 * 0.604131 + 0.9 * 0.319094),
    Golden("prod", TWO_POSITIVES, 0.1 * 0.201413 + 0.9 * 0.319094),
    Golden("learning_without_forgetting", LIST, 0.319094),
    Golden("taid", LIST, 0.183843),
    # The target is the softmax of 1.5, .25, .25: .635724, .182138, .182138.
    Golden("taid", dataclasses.replace(LIST, blend=HALF), 0.060072),
    Golden("taid", dataclasses.replace(BATCH, blend=HALF), 0.060072, {"of": "tct", "teacher_temperature": 1.0}),
    Golden("pair_distill", PAIR, 0.113953),
    Golden("info_nce", BATCH, 0.604131, ONE),
    Golden("info_nce", dataclasses.replace(BATCH, positives=_b([1, 1, 0])), (0.201413 + 0.313262) / 2, ONE),
    Golden("info_nce", PASSAGES, 0.371101, ONE),
    Golden("denoised_info_nce", dataclasses.replace(BATCH, teacher=_t([1, 0.7, 0.5])), 0.201413, ONE),
    Golden("soft_nearest_neighbour", dataclasses.replace(BATCH, positives=_b([1, 1, 0])), 0.130054, ONE),
    Golden("partial_plackett_luce", dataclasses.replace(BATCH, scored=_b([1, 1, 0])), 0.604131 + 0.313262, ONE),
    Golden("tct", dataclasses.replace(BATCH, teacher=_t(T) / 4), 0.183843),
    Golden("tct", dataclasses.replace(BATCH, teacher=_t(T) / 4), (0.183843 + 0.604131) / 2, {"gamma": 0.5}),
    Golden("passage_centric", PASSAGES, 0.598138),
    Golden("adaptive_margin", ARM, 0.021447),
    Golden("adaptive_margin", ARM, 0.146447, {"target": "adaptive", "penalty": "absolute"}),
    Golden("adaptive_margin", TRIPLES, (0.1**2 + 0.4**2) / 2, {"target": "adaptive"}),
    Golden("adaptive_margin", TRIPLES, (0.1**2 + 0.3**2 + 0.6**2 + 0.4**2) / 4, {"target": "distributed"}),
    Golden("adaptive_margin", TRIPLES, (0.5**2 + 0.9**2) / 2, {"target": "static", "margin": 1.0}),
    Golden("embedding_regression", VECTORS, 1.0),
    Golden("embedding_regression", VECTORS, R, {"kind": "l2"}),
    Golden("embedding_regression", VECTORS, 0.5, {"kind": "cosine"}),
    Golden(
        "contrastive_kd", EmbeddingInputs(student=EYE[:2], teacher=EYE[:2], bank=EYE[2:]), log(1 + 3 / 2.718282), ONE
    ),
    Golden("relational_distance", LINE, 0.0625 / 3),
    Golden("relational_angle", CORNER, (0.5 + 1.207107 + 0.042893) / 3),
    # The teacher's first two coincide: only the corner at the third has an angle on both sides, 45 degrees against 0.
    Golden("relational_angle", dataclasses.replace(CORNER, teacher=_t([1.0], [1.0], [2.0])), 0.042893),
    Golden("layer_alignment", LAYERS, 0.183843 / 2),
    # KL(1/2, 1/4, 1/4 || uniform) = log 3 - 1.5 log 2; the layers' weights are as 1/3 to 1/2.
    Golden(
        "layer_alignment",
        TEMPERED,
        3 / 5 * (log(3) - 1.5 * log(2)),
        {"temperature": 0.5, "layer_temperature": 1.0},
    ),
    # Without the other positive they are as 1/2 to 2/3.
    Golden(
        "layer_alignment",
        dataclasses.replace(TEMPERED, positives=TWO_POSITIVES.positives),
        4 / 7 * (log(3) - 1.5 * log(2)),
        {"temperature": 0.5, "layer_temperature": 1.0},
    ),
    Golden("self_distillation", HEADS, 0.185890),
]
