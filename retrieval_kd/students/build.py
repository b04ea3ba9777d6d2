"""A student: chosen layers of an encoder, or its token vectors alone, in the space it is to learn."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from retrieval_kd.encoders.base import TOKENIZER, Vectors
from retrieval_kd.encoders.card import EncoderCard
from retrieval_kd.encoders.static import ARCHITECTURE, StaticBody, without_special_tokens
from retrieval_kd.encoders.torch_encoder import TorchEncoder, empty_linear, width_of
from retrieval_kd.errors import RecipeError
from retrieval_kd.recipes.schema import StudentSpec
from retrieval_kd.students.static import token_table
from retrieval_kd.students.vocabulary import Ids, kept_tokens, prune, token_counts

RIDGE = 1e-3
"""Ridge of a fitted projection, as a share of the mean variance of the states."""


def build_student(
    start: TorchEncoder, spec: StudentSpec, target: EncoderCard, texts: Iterable[str] = ()
) -> TorchEncoder:
    """Make a smaller encoder out of an encoder's layers, or of what it says of each token.

    A projection starts as the identity, or as a random orthonormal map where widths differ, so that the
    student begins where its layers leave off; :func:`fit_projection` leads one of another space into the target's.
    All layers and no projection give the start's vectors.

    Args:
        start: The encoder the student is made from; they share nothing.
        spec: Mode, kind, layers, pooling, projection, dropout, Matryoshka sizes and vocabulary.
        target: The encoder whose width, and in asymmetric mode whose space, the student learns.
        texts: Whose tokens ``spec.vocabulary`` keeps and a static student weighs; read only then.

    Returns:
        The student: a query encoder in the target's space, or a symmetric encoder of its own.

    Raises:
        RecipeError: a layer that ``start`` does not have, a Matryoshka size not below the target's width, or a
            vocabulary that cannot be cut.
    """
    if spec.matryoshka and spec.matryoshka[0] >= target.dimension:
        raise RecipeError(
            f"student.matryoshka: {spec.matryoshka[0]} is not below the full width {target.dimension}, which is always "
            "trained; leave it out"
        )
    card = replace(
        start.card,
        pooling=spec.pooling,
        normalize=target.normalize,
        similarity=target.similarity,
        dimensions=(target.dimension, *spec.matryoshka),
        role="symmetric",
        space="",
    )
    if spec.mode == "asymmetric":
        card = card.in_space_of(target, "query")
    if spec.vocabulary.keep == "all":
        counts = _counts(start, texts if spec.kind == "static" else ())
    else:
        counts = _counts(start, texts)
        kept = kept_tokens(start.tokenizer_files[TOKENIZER], counts, spec.vocabulary)
        start, counts = prune(start, kept), counts[kept]
    student = _static(start, counts, card) if spec.kind == "static" else _transformer(start, spec, card)
    student.refresh_card()
    return student


def _counts(start: TorchEncoder, texts: Iterable[str]) -> Ids:
    # Every text begins with one of the prefixes.
    prefixes = (start.card.query_prefix, start.card.document_prefix)
    return token_counts(start.tokenizer_files[TOKENIZER], itertools.chain(prefixes, texts))


def _transformer(start: TorchEncoder, spec: StudentSpec, card: EncoderCard) -> TorchEncoder:
    if isinstance(start.body, StaticBody):
        raise RecipeError(f"student.kind: encoder {start.card.name!r} has no layers to keep; use static")
    body = copy.deepcopy(start.body)
    keep_layers(body, spec.layers, "student.layers")
    _set_dropout(body, spec.dropout)
    width = width_of(body)
    projection = copy.deepcopy(start.projection)
    if projection is not None and projection.out_features != card.dimension:
        projection = None
    if projection is None and (spec.projection or spec.start is not None or width != card.dimension):
        projection = _undisturbing(width, card.dimension)
    layers = len(spec.layers)
    card = replace(card, name=f"{start.card.name}-{layers}-layers", layers=layers)
    return TorchEncoder(body, projection, start.tokenizer_files, card)


def _static(start: TorchEncoder, counts: Ids, card: EncoderCard) -> TorchEncoder:
    body = token_table(start, counts)
    if body.width != card.dimension:
        with torch.no_grad():
            body.embeddings = nn.Parameter(_undisturbing(body.width, card.dimension)(body.embeddings))
    # A prefix would add the same vectors to every text.
    card = replace(
        card, name=f"{start.card.name}-static", architecture=ARCHITECTURE, layers=0, query_prefix="", document_prefix=""
    )
    # The tokenizer cuts by itself for sentence-transformers, which gives static models no length.
    files = {TOKENIZER: without_special_tokens(start.tokenizer_files[TOKENIZER], card.max_length)}
    return TorchEncoder(body, None, files, card)


def fit_projection(student: TorchEncoder, texts: Sequence[str], targets: Vectors) -> None:
    """Set a student's projection, in place, to the linear map that leads its queries nearest to given vectors.

    Least squares with a small ridge, so that fewer texts than dimensions have one answer too. Two encoders of the
    same language differ by little more than a linear map; starting from it, training need not find it by steps.

    Args:
        student: An encoder with a projection.
        texts: Queries.
        targets: float32 ``[len(texts), d]``, what their vectors should be.
    """
    projection = student.projection
    assert projection is not None
    width = projection.in_features
    card = replace(student.card, normalize=False, dimensions=(width,))
    states = TorchEncoder(student.body, None, student.tokenizer_files, card).encode(texts, "query").astype(np.float64)
    mean, target_mean = states.mean(axis=0), targets.mean(axis=0, dtype=np.float64)
    states -= mean
    gram = states.T @ states
    # Texts that are all alike vary by nothing, and their map is their mean alone.
    gram[np.diag_indices(width)] += max(RIDGE * np.trace(gram) / width, np.finfo(np.float64).tiny)
    weight = np.linalg.solve(gram, states.T @ (targets - target_mean)).T
    with torch.no_grad():
        projection.weight.copy_(torch.from_numpy(weight))
        projection.bias.copy_(torch.from_numpy(target_mean - weight @ mean))
    student.refresh_card()


def keep_layers(body: nn.Module, layers: tuple[int, ...], key: str) -> None:
    """Keep some of a transformer's layers, in place.

    Args:
        body: The transformer.
        layers: The layers kept, 0-based, increasing.
        key: The recipe's key that an error names.

    Raises:
        RecipeError: a layer that ``body`` does not have.
    """
    config = cast("Any", body.config)
    stack = _layers(body, config.num_hidden_layers, key)
    if layers[-1] >= len(stack):
        raise RecipeError(f"{key}: no layer {layers[-1]}, the model has {len(stack)} layers, 0 to {len(stack) - 1}")
    kept = [stack[number] for number in layers]
    del stack[:]
    stack.extend(kept)
    config.num_hidden_layers = len(kept)


def _layers(body: nn.Module, count: int, key: str) -> nn.ModuleList:
    """Find the stack of layers, whatever a family of transformers calls it."""
    for module in body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise RecipeError(f"{key}: {type(body).__name__} has no list of {count} layers to choose from")


def _set_dropout(body: nn.Module, rate: float) -> None:
    for module in body.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
    config = cast("Any", body.config)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, rate)


def _undisturbing(width: int, dimension: int) -> nn.Linear:
    projection = empty_linear(width, dimension)
    nn.init.zeros_(projection.bias)
    if width == dimension:
        nn.init.eye_(projection.weight)
    else:
        # The one draw of a build; a fixed generator keeps a student a function of its recipe alone.
        nn.init.orthogonal_(projection.weight, generator=torch.Generator().manual_seed(0))
    return projection
