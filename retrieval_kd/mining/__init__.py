"""Candidates: BM25 and dense first stages, and the negatives drawn from them."""
