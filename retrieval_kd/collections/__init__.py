"""Corpora with queries and judgements, in the layouts people have."""

from retrieval_kd.collections.open import open_collection

__all__ = ["open_collection"]
