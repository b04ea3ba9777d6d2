"""What most people write first: FastAPI, SentenceTransformer.encode for each request, faiss. ``WORLD PORT``."""

from __future__ import annotations

import sys
from pathlib import Path

import faiss
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

WORLD, PORT = Path(sys.argv[1]), int(sys.argv[2])
faiss.omp_set_num_threads(1)
model = SentenceTransformer(str(WORLD / "model"), device="cpu")
index = faiss.read_index(str(WORLD / "hnsw.faiss"))
ids = (WORLD / "ids.txt").read_text().splitlines()
app = FastAPI()


class Query(BaseModel):
    """A request's body."""

    text: str


@app.post("/search")
async def search(query: Query) -> dict[str, object]:
    """Return the best ten documents, one query after the other: the tokenizer fails when two threads use it."""
    vectors = model.encode([query.text], normalize_embeddings=True, show_progress_bar=False)
    scores, found = index.search(vectors, 10)
    return {"hits": [[ids[i], float(score)] for i, score in zip(found[0], scores[0], strict=True)]}


uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning", timeout_keep_alive=300)
