"""A token table that starts as what an encoder says of each token alone, weighed by how rare it is.

A bare mean of such vectors is a poor query: on msmarco-12k's dev queries, over MiniLM's own document vectors, its
nDCG@10 is .347. Rare tokens say more (smooth inverse frequency, Arora, Liang and Ma 2017, with their a of 1e-3:
.630), and all vectors share a direction that says nothing (without their mean as well: .783).
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor

from retrieval_kd.encoders.base import TOKENIZER
from retrieval_kd.encoders.static import StaticBody
from retrieval_kd.encoders.torch_encoder import BATCH_TOKENS, TorchEncoder, evaluating
from retrieval_kd.progress import progress
from retrieval_kd.students.vocabulary import Ids

SMOOTHING = 1e-3


def token_table(start: TorchEncoder, counts: Ids) -> StaticBody:
    """Make a table of an encoder's token vectors in the encoder's space.

    It is model2vec's without principal components, which would leave that space: a token's vector is the
    encoder's of the token alone, less the mean over a running text; its weight is ``a / (a + p)`` for a token
    that is the share ``p`` of all.

    Args:
        start: The encoder.
        counts: int64 ``[V]``, how often each token occurs; where none does, all count alike.

    Returns:
        Vectors ``[V, d]`` with ``d`` the encoder's full width, and weights.
    """
    shares = torch.from_numpy(counts if counts.any() else counts + 1).double()
    shares = shares / shares.sum()
    vectors = _alone(start).double()
    centred = vectors - shares @ vectors
    return StaticBody(centred.float(), (SMOOTHING / (SMOOTHING + shares)).float())


def _alone(start: TorchEncoder) -> Tensor:
    """Encode every token of the vocabulary as a text of its own, between the special tokens of a text."""
    tokenizer = Tokenizer.from_buffer(start.tokenizer_files[TOKENIZER])
    before, after = _special_tokens(tokenizer)
    count = tokenizer.get_vocab_size()
    rows = torch.tensor([[*before, token, *after] for token in range(count)])
    table = torch.empty(count, start.card.dimension)
    with evaluating(start), torch.inference_mode(), progress("encode the vocabulary", count, "tokens") as advance:
        for part in torch.split(torch.arange(count), BATCH_TOKENS // rows.shape[1]):
            ids = rows[part].to(start.device)
            table[part] = start(ids, torch.ones_like(ids)).float().cpu()
            advance(len(part))
    return table


def _special_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after a text."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    first = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:first], whole[first + len(bare) :]
