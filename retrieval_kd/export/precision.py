"""Exports of lower precision, and the gate that measures what they cost in retrieval.

Vectors of lower precision differ from torch's in every entry, so the gate of fp32 says nothing of them: a
precision is published only if it keeps nDCG@10 on dev, and its card says how near it comes. What is lowered
are products with weights; attention's products of two activations, pooling and length stay in float32.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from retrieval_kd.artifacts import bytes_sha256
from retrieval_kd.batching import pad
from retrieval_kd.encoders.card import EncoderCard, Fidelity, Precision, Side
from retrieval_kd.encoders.onnx import INPUTS, OnnxEncoder, open_session
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.errors import DataError, ParityError, RecipeError
from retrieval_kd.export.parity import DEPTH, Probes, probe_texts, ranked
from retrieval_kd.quality import ndcg_at_10
from retrieval_kd.recipes.schema import ExportSpec

_PRODUCTS = ("MatMul", "Gemm", "Gather")


def lowered(
    plain: onnx.ModelProto, encoder: TorchEncoder, gate: ExportSpec, probes: Probes, calibration: Sequence[str]
) -> tuple[bytes, EncoderCard]:
    """Lower an encoder's graph to the precision of ``gate`` if it keeps its quality.

    Args:
        plain: The traced graph, without fusions.
        encoder: Where it came from, the reference.
        gate: The precision, and how much of nDCG@10 it may lose.
        probes: Queries of dev with judgements, and the vectors they search.
        calibration: Texts that ranges of activations are measured on, never those of ``probes``; ``int8-static``
            needs them.

    Returns:
        The graph's bytes, and the card with its fidelity. int8 encodes queries alone: documents are encoded
        once, and their index outlives the arithmetic of one machine.

    Raises:
        ParityError: more of nDCG@10 is lost than ``gate`` allows.
        RecipeError: the graph has nothing to lower, or the encoder is of documents alone.
        DataError: no judged query that finds anything, or nothing to calibrate on.
    """
    rows = encoder.tokenizer(calibration, _side(encoder.card))
    model = lower_graph(plain, gate.precision, rows)
    card = encoder.card
    role = card.role
    if gate.precision != "fp16":
        if role == "document":
            raise RecipeError(f"export.precision: {gate.precision} is for queries alone; export documents as fp32")
        role = "query"
    card = replace(
        card,
        precision=gate.precision,
        role=role,
        space=card.space_fingerprint,
        weights_hash=bytes_sha256(model),
    )
    exported = OnnxEncoder(open_session(model), encoder.tokenizer, card)
    fidelity = measure_fidelity(encoder, exported, probes)
    require(fidelity, gate)
    return model, replace(card, fidelity=fidelity)


def lower_graph(plain: onnx.ModelProto, precision: Precision, rows: Sequence[Sequence[int]]) -> bytes:
    """Return the bytes of a graph of lower precision.

    int8 weights are signed, of 7 bits and with one scale a column: without VNNI, the sum of two products of 8
    bits saturates (microsoft/onnxruntime#14642).

    Args:
        plain: It is not changed.
        precision: Any but fp32.
        rows: Token ids of the texts to calibrate on.

    Raises:
        RecipeError: the graph has nothing to lower.
        DataError: nothing to calibrate on.
    """
    if precision == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        half: bytes = convert_float_to_float16(_copy(plain), keep_io_types=True).SerializeToString()
        return half
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    nodes = [node for node in _weighted(plain) if precision == "int8-dynamic" or not _narrows(plain, node)]
    if not any(node.op_type != "Gather" for node in nodes):
        raise RecipeError(f"export.precision: the encoder has no product with weights for {precision}; use fp32")
    options: dict[str, Any] = {
        "op_types_to_quantize": list(_PRODUCTS),
        "nodes_to_quantize": [node.name for node in nodes],
        "per_channel": True,
        "reduce_range": True,
        "weight_type": QuantType.QInt8,
        # Shapes that inference cannot know are those of token states.
        "extra_options": {"DefaultTensorType": onnx.TensorProto.FLOAT},
    }
    with tempfile.TemporaryDirectory() as folder, _without_advice():
        path = Path(folder) / "lowered.onnx"
        if precision == "int8-dynamic":
            quantize_dynamic(_copy(plain), path, **options)
        else:
            if not rows:
                raise DataError("export.precision: int8-static needs texts to calibrate on; give training queries")
            options |= {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt8}
            quantize_static(_copy(plain), path, _Calibration(rows), **options)
        return path.read_bytes()


def measure_fidelity(reference: TorchEncoder, exported: OnnxEncoder, probes: Probes) -> Fidelity:
    """Compare an encoder of lower precision with its origin on dev.

    Raises:
        DataError: no judged query that finds anything, so nothing can be told of quality.
    """
    before, after = {}, {}
    texts = probe_texts(probes, reference.card)
    for side, some in texts.items():
        before[side] = reference.encode(list(some.values()), side)
        # Where documents have no vectors of lower precision, queries search those of full precision.
        lower = exported.card.role in ("symmetric", side)
        after[side] = exported.encode(list(some.values()), side) if lower else before[side]
    compared = [side for side in texts if exported.card.role in ("symmetric", side)]
    cosines = np.concatenate([_cosines(before[side], after[side]) for side in compared])
    old, new = ranked(before, probes, reference.card), ranked(after, probes, reference.card)
    ndcg_reference = ndcg_at_10(old, probes.qrels) if old and probes.qrels else 0.0
    if ndcg_reference == 0:
        raise DataError(
            f"export of {exported.card.name!r} as {exported.card.precision}: no judged dev query finds anything, so "
            "its cost is unknown; give a dev split or export fp32"
        )
    return Fidelity(
        cosine_min=float(cosines.min()),
        cosine_p1=float(np.percentile(cosines, 1)),
        cosine_p50=float(np.percentile(cosines, 50)),
        ndcg_reference=ndcg_reference,
        ndcg=ndcg_at_10(new, probes.qrels) if np.isfinite(cosines).all() else 0.0,
        texts=len(cosines),
        queries=len(old),
    )


def require(fidelity: Fidelity, gate: ExportSpec) -> None:
    """Refuse a precision that costs too much.

    Raises:
        ParityError: names the loss and both figures.
    """
    loss = 1 - fidelity.ndcg / fidelity.ndcg_reference
    if not loss <= gate.max_ndcg_loss:
        raise ParityError(
            f"{gate.precision} loses {loss:.2%} of nDCG@{DEPTH} ({fidelity.ndcg_reference:.4f} to {fidelity.ndcg:.4f} "
            f"over {fidelity.queries} dev queries), the gate allows {gate.max_ndcg_loss:.2%}; nothing was exported, "
            "use fp32 or widen export.max_ndcg_loss"
        )


def _copy(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a graph; onnxruntime's tools change theirs."""
    copied = onnx.ModelProto()
    copied.CopyFrom(graph)
    return copied


class _Calibration:
    """Feeds token rows one by one, as onnxruntime's calibration asks for them."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self._feeds: Iterator[Mapping[str, Any]] = (dict(zip(INPUTS, pad([row]), strict=True)) for row in rows)

    def get_next(self) -> Mapping[str, Any] | None:
        """Return the next feed, or None after the last."""
        return next(self._feeds, None)


def _weighted(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the products of activations with weights, and the look-ups in tables of weights."""
    weights = {tensor.name for tensor in graph.graph.initializer if len(tensor.dims) == 2}
    return [node for node in graph.graph.node if node.op_type in _PRODUCTS and weights & set(node.input[:2])]


def _narrows(graph: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Return whether a product makes its input narrower: the second half of a feed-forward block.

    Its input has outliers that leave few steps of a fixed scale for the rest: on MiniLM's first, third and sixth
    layer the median cosine is .992 without these products and .933 with them.
    """
    shapes = {tensor.name: tensor.dims for tensor in graph.graph.initializer}
    shape = next(shapes[name] for name in node.input[:2] if name in shapes)
    return node.op_type != "Gather" and int(shape[0]) > int(shape[1])


def _cosines(one: Any, other: Any) -> Any:
    products = np.einsum("nd,nd->n", one.astype(np.float64), other.astype(np.float64))
    return products / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))


def _side(card: EncoderCard) -> Side:
    return "document" if card.role == "document" else "query"


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence onnxruntime's advice to preprocess a graph, which it does itself."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
