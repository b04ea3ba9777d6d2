"""A cross-encoder from torch to ONNX, through a gate of its own: the same logits on real pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from retrieval_kd.artifacts import Artifact, Spec, atomic_write, build, file_sha256, fingerprint
from retrieval_kd.encoders.base import TOKENIZER, load_tokenizer
from retrieval_kd.encoders.onnx import BATCH_TOKENS, MODEL, open_session
from retrieval_kd.errors import DataError, ParityError
from retrieval_kd.export.graph import OPSET
from retrieval_kd.runs import Scores
from retrieval_kd.teachers.cross_encoder import load_classifier
from retrieval_kd.teachers.onnx_classifier import classifier_graph
from retrieval_kd.teachers.onnx_reranker import STAGE, OnnxReranker, RerankerCard
from retrieval_kd.teachers.pairs import PairTokenizer, logits
from retrieval_kd.teachers.rows import PairRows

# A logit sums more terms than a vector's entry, and rankers spread theirs over tens.
MAX_ABS_ERROR = 1e-4


def export_reranker(
    model: Path, max_length: int, template: str, pairs: Sequence[tuple[str, str]], folder: Path
) -> Artifact:
    """Write a cross-encoder as an ONNX artifact that scores like it.

    The artifact has ``model.onnx`` (int64 inputs ``[B, L]`` to float32 ``logits`` ``[B, labels]``), ``tokenizer.json``
    and ``reranker.json``; :class:`retrieval_kd.teachers.onnx_reranker.OnnxReranker` opens it.

    Args:
        model: Folder of a sequence classifier with one label or two.
        max_length: Longest pair in tokens.
        template: A prompt with ``{query}`` and ``{document}``; the tokenizer's own pair when empty.
        pairs: (query, document) texts to compare on.
        folder: Where the artifact goes.

    Raises:
        ParityError: a logit differs from torch's by more than 1e-4; no artifact is left.
        ArtifactError: the classifier cannot be read.
        DataError: no pair to compare on.
    """
    if not pairs:
        raise DataError(f"export of {model}: no pair to compare with torch; give some")
    files = [*sorted(model.glob("*.safetensors")), model / "config.json", model / TOKENIZER]
    weights = fingerprint({path.name: file_sha256(path) for path in files})
    config = {"max_length": max_length, "template": template, "opset": OPSET}
    spec = Spec(STAGE, config, {"model": weights, "pairs": fingerprint([list(pair) for pair in pairs])})

    def work(target: Path) -> Mapping[str, Any]:
        classifier = load_classifier(model).eval()
        tokenizer = PairTokenizer(load_tokenizer(model), classifier, max_length, template)
        card = RerankerCard(model.name, max_length, template, tokenizer.inputs, tokenizer.pad_id, weights)
        with torch.inference_mode():
            device = torch.device("cpu")
            expected = logits(classifier, tokenizer, tokenizer(pairs), BATCH_TOKENS, device).numpy()
        graph = classifier_graph(classifier, tokenizer.inputs)
        error = _error(graph, PairRows(load_tokenizer(model), max_length, template), card, pairs, expected)
        for name, content in ((MODEL, graph.SerializeToString()), (TOKENIZER, (model / TOKENIZER).read_bytes())):
            with atomic_write(target / name, "wb") as file:
                file.write(content)
        card.save(target)
        return {"max_abs_error": error, "pairs": len(pairs)}

    return build(folder, spec, work)


def _error(
    graph: onnx.ModelProto, rows: PairRows, card: RerankerCard, pairs: Sequence[tuple[str, str]], expected: Scores
) -> float:
    exported = OnnxReranker(open_session(graph.SerializeToString()), rows, card)
    errors = np.abs(exported.score_pairs(pairs) - expected)
    worst = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
    # NaN compares false.
    if not errors[worst] <= MAX_ABS_ERROR:
        raise ParityError(
            f"the exported reranker's logit of query {pairs[worst][0]!r} differs from torch by {errors[worst]:.3g}, "
            f"{MAX_ABS_ERROR:g} is allowed; nothing was exported"
        )
    return float(errors[worst])
