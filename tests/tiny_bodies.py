"""Random bodies of several transformer families, with the tokenizer of :mod:`tiny`."""

from __future__ import annotations

from dataclasses import replace

import torch
from tiny import WORDS, tiny_encoder

from retrieval_kd.encoders.torch_encoder import TorchEncoder

FAMILIES = ("bert", "distilbert", "xlm-roberta", "mpnet")
TEXTS = ["w1", "w2 w3 w4", "w5 w5 w6 w7 w8 w9", "w10 w11 w12", " ".join(WORDS), "", "w4 w3 w2"]


def tiny_family(family: str, layers: int = 3, seed: int = 0) -> TorchEncoder:
    """Return a symmetric encoder of width 16 whose body is of the given family."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        family,
        vocab_size=len(WORDS) + 4,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dim=32,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = AutoModel.from_config(config)
    if getattr(body, "pooler", None) is not None:
        body.pooler = None
    base = tiny_encoder()
    encoder = TorchEncoder(body, None, base.tokenizer_files, replace(base.card, architecture=family, layers=layers))
    encoder.refresh_card()
    return encoder.eval()
