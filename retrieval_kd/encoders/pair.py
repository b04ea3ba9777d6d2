"""A query encoder and a document encoder as one model, for whoever has only sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrieval_kd.artifacts import Spec, build
from retrieval_kd.encoders.card import require_same_space
from retrieval_kd.encoders.layout import MODULES, SIDES, write_router
from retrieval_kd.encoders.torch_encoder import TorchEncoder

STAGE = "pair"


def save_pair(query: TorchEncoder, document: TorchEncoder, folder: Path) -> None:
    """Write two encoders of one space as a sentence-transformers model with a route for each side.

    ``SentenceTransformer(folder)`` gives their vectors with ``encode_query`` and ``encode_document``; the folders
    ``query`` and ``document`` are encoders of their own.

    Raises:
        EncoderMismatch: queries would not lie in the documents' space.
        ArtifactError: the folder holds something else, which is left alone.
    """
    require_same_space(query.card, document.card)
    document.card.prefix("document")
    sides = dict(zip(SIDES, (query, document), strict=True))

    def work(target: Path) -> Mapping[str, Any]:
        # The file that joins the two comes last: a save that is cut short is no model.
        (target / MODULES).unlink(missing_ok=True)
        for side, encoder in sides.items():
            encoder.save(target / side)
        write_router(target, query.card.query_prefix, document.card.document_prefix, document.card.similarity)
        return {side: encoder.card.name for side, encoder in sides.items()}

    build(folder, Spec(STAGE, {side: encoder.refresh_card().to_json() for side, encoder in sides.items()}), work)


def open_pair(folder: Path) -> tuple[TorchEncoder, TorchEncoder]:
    """Read the query and the document encoder that :func:`save_pair` wrote.

    Raises:
        ArtifactError: one of them is missing or torn; names the file.
        EncoderMismatch: they are not of one space.
    """
    query, document = (TorchEncoder.open(folder / side) for side in SIDES)
    require_same_space(query.card, document.card)
    return query, document
