"""A body without layers: every token has one vector, whatever stands beside it.

A query then costs a table look-up and a mean, which is why a static query encoder can search the vectors
of a large document encoder at almost no cost of its own (model2vec; StaticEmbedding of sentence-transformers).
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from retrieval_kd.errors import ArtifactError

ARCHITECTURE = "static"


class StaticBody(nn.Module):
    """Token ids to token states by look-up; pooling makes them a weighted mean.

    Under unit length a token's weight is its say in the direction of the mean. Kept apart from the vector, one
    gradient step can change it; within the vector each of its entries would have to move.

    Attributes:
        embeddings: ``[V, d]``, one vector a token.
        weights: ``[V]``, its factor.
        sparse: Whether the vectors' gradient has the rows that were read alone.
    """

    sparse = False

    def __init__(self, embeddings: Tensor, weights: Tensor) -> None:
        """Take over the two tables."""
        super().__init__()
        self.embeddings = nn.Parameter(embeddings)
        self.weights = nn.Parameter(weights)

    @property
    def width(self) -> int:
        """Return the width of a token's vector."""
        return self.embeddings.shape[1]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return float ``[B, L, d]`` for int64 ``[B, L]``."""
        vectors = F.embedding(input_ids, self.embeddings, sparse=self.sparse)
        return vectors * F.embedding(input_ids, self.weights.unsqueeze(1))


def read_static(path: Path) -> StaticBody:
    """Read the weights of a StaticEmbedding module: one table, or model2vec's table, mapping and weights.

    Raises:
        ArtifactError: the file is missing, torn, or holds other tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        table = tensors["embedding.weight"] if "embedding.weight" in tensors else tensors["embeddings"]
    except (OSError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot read the token vectors ({error}); save the model again") from None
    if "mapping" in tensors:
        table = table[tensors["mapping"].long()]
    weights = tensors.get("weights", torch.ones(len(table)))
    if table.ndim != 2 or weights.shape != table.shape[:1]:
        raise ArtifactError(
            f"{path}: vectors {tuple(table.shape)} and weights {tuple(weights.shape)} do not fit; save the model again"
        )
    return StaticBody(table.float(), weights.float())


def without_special_tokens(tokenizer_json: bytes, max_length: int | None = None) -> bytes:
    """Return a tokenizer that adds no ``[CLS]`` or ``[SEP]``, as sentence-transformers reads static models.

    Args:
        tokenizer_json: A ``tokenizer.json``; returned as it is if nothing has to change.
        max_length: Where it cuts by itself, for readers that have no other length; not at all when None.
    """
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    if tokenizer.post_processor is None and max_length is None:
        return tokenizer_json
    tokenizer.post_processor = None
    tokenizer.no_padding()
    if max_length is not None:
        tokenizer.enable_truncation(max_length)
    content: str = tokenizer.to_str()
    return content.encode()
