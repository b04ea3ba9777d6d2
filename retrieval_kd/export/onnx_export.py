"""From torch to ONNX: one graph from token ids to the vector, through the parity gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import onnx

from retrieval_kd.artifacts import Artifact, Spec, atomic_write, build, fingerprint
from retrieval_kd.encoders.base import TOKENIZER
from retrieval_kd.encoders.onnx import INPUTS, MODEL, OUTPUT, STAGE, OnnxEncoder, open_session
from retrieval_kd.encoders.static import StaticBody
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.export.graph import OPSET, fuse, token_sum, trace
from retrieval_kd.export.parity import Parity, Probes, measure_parity
from retrieval_kd.export.precision import lowered
from retrieval_kd.recipes.schema import ExportSpec

__all__ = ["Parity", "Probes", "export_encoder"]


def export_encoder(
    encoder: TorchEncoder, folder: Path, gate: ExportSpec, probes: Probes, calibration: Sequence[str] = ()
) -> Artifact:
    """Write an encoder as an ONNX artifact that reproduces it.

    The artifact has ``model.onnx`` (int64 ``input_ids`` and ``attention_mask`` ``[B, L]`` to float32
    ``sentence_embedding`` ``[B, d]``), ``tokenizer.json`` and ``card.json``; its summary has the
    measured parity, or below fp32 the fidelity, which the card has too.

    Args:
        encoder: The encoder; it is not changed.
        folder: Where the artifact goes.
        gate: The precision, and how far the export may be from torch.
        probes: Real texts to compare on.
        calibration: Other texts, on which ``int8-static`` measures the ranges of activations.

    Raises:
        ParityError: the export is outside the gate; no artifact is left.
        DataError: the probes have no text that the encoder encodes.
        RecipeError: the encoder has no such precision.
    """
    card = encoder.refresh_card()
    spec = Spec(
        stage=STAGE,
        config={**dataclasses.asdict(gate), "opset": OPSET},
        inputs={
            "encoder": fingerprint(card.to_json()),
            "probes": probes.fingerprint,
            "calibration": fingerprint(list(calibration)),
        },
    )

    def work(target: Path) -> Mapping[str, Any]:
        plain = trace(encoder, INPUTS, OUTPUT)
        if gate.precision == "fp32":
            model, parity = _reproducing(plain, encoder, gate, probes)
            written, measured = card, dataclasses.asdict(parity)
        else:
            model, written = lowered(plain, encoder, gate, probes, calibration)
            measured = dataclasses.asdict(written)["fidelity"]
        for name, content in ((MODEL, model), (TOKENIZER, encoder.tokenizer_files[TOKENIZER])):
            with atomic_write(target / name, "wb") as file:
                file.write(content)
        written.save(target)
        return measured

    return build(folder, spec, work)


def _reproducing(
    plain: onnx.ModelProto, encoder: TorchEncoder, gate: ExportSpec, probes: Probes
) -> tuple[bytes, Parity]:
    """Return the faster graph if it passes the gate, else the plain one, else raise :class:`ParityError`."""
    faster = _faster(plain, encoder)
    if faster is not None:
        parity = _measure(faster, encoder, probes)
        if parity.failure(gate) is None:
            return faster.SerializeToString(), parity
    parity = _measure(plain, encoder, probes)
    parity.require(gate)
    return plain.SerializeToString(), parity


def _faster(plain: onnx.ModelProto, encoder: TorchEncoder) -> onnx.ModelProto | None:
    """Return a graph of fewer operators, if there is one."""
    body, card = encoder.body, encoder.card
    if not isinstance(body, StaticBody):
        return fuse(plain, cast("Any", body.config))
    # Under unit length nothing is left of the mean's divisor.
    if encoder.projection is None and card.normalize and card.pooling == "mean":
        return token_sum(body.embeddings * body.weights.unsqueeze(1), INPUTS, OUTPUT)
    return None


def _measure(graph: onnx.ModelProto, encoder: TorchEncoder, probes: Probes) -> Parity:
    exported = OnnxEncoder(open_session(graph.SerializeToString()), encoder.tokenizer, encoder.card)
    return measure_parity(encoder, exported, probes)
