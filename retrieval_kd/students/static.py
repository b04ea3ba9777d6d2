"""A token table that starts as what an encoder says of each token alone."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from retrieval_kd.encoders.base import TOKENIZER
from retrieval_kd.encoders.static import StaticBody
from retrieval_kd.encoders.torch_encoder import BATCH_TOKENS, TorchEncoder, evaluating
from retrieval_kd.progress import progress


def token_table(start: TorchEncoder) -> StaticBody:
    """Encode every token of the vocabulary as a text of its own, between the special tokens of a text.

    The mean of token vectors then lies in the encoder's space before any training (model2vec without its
    principal components, which would leave that space). All weights are 1.

    Returns:
        Vectors ``[V, d]`` with ``d`` the encoder's full width.
    """
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
    return StaticBody(table, torch.ones(count))


def _special_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after a text."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    first = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:first], whole[first + len(bare) :]
