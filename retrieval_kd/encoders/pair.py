"""A query encoder and a document encoder as one model, for whoever has only sentence-transformers."""

from __future__ import annotations

from pathlib import Path

from retrieval_kd.encoders.card import require_same_space
from retrieval_kd.encoders.layout import MODULES, SIDES, write_router
from retrieval_kd.encoders.torch_encoder import TorchEncoder


def save_pair(query: TorchEncoder, document: TorchEncoder, folder: Path) -> None:
    """Write two encoders of one space as a sentence-transformers model with a route for each side.

    ``SentenceTransformer(folder)`` gives their vectors with ``encode_query`` and ``encode_document``; the folders
    ``query`` and ``document`` are encoders of their own.

    Raises:
        EncoderMismatch: queries would not lie in the documents' space.
    """
    require_same_space(query.card, document.card)
    document.card.prefix("document")
    # The file that joins the two comes last: a save that is cut short is no model.
    (folder / MODULES).unlink(missing_ok=True)
    for side, encoder in zip(SIDES, (query, document), strict=True):
        encoder.save(folder / side)
    write_router(folder, query.card.query_prefix, document.card.document_prefix, document.card.similarity)


def open_pair(folder: Path) -> tuple[TorchEncoder, TorchEncoder]:
    """Read the query and the document encoder that :func:`save_pair` wrote.

    Raises:
        ArtifactError: one of them is missing or torn; names the file.
        EncoderMismatch: they are not of one space.
    """
    query, document = (TorchEncoder.open(folder / side) for side in SIDES)
    require_same_space(query.card, document.card)
    return query, document
