"""infinity-emb's batching engine (torch), FastAPI and faiss. ``WORLD PORT``."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from pathlib import Path

import faiss
import numpy as np
import uvicorn
from fastapi import FastAPI
from infinity_emb import AsyncEmbeddingEngine, EngineArgs
from pydantic import BaseModel

WORLD, PORT = Path(sys.argv[1]), int(sys.argv[2])
faiss.omp_set_num_threads(1)
arguments = EngineArgs(
    model_name_or_path=str(WORLD / "model"), engine="torch", device="cpu", dtype="float32", bettertransformer=False
)
engine = AsyncEmbeddingEngine.from_args(arguments)
index = faiss.read_index(str(WORLD / "hnsw.faiss"))
ids = (WORLD / "ids.txt").read_text().splitlines()


@asynccontextmanager
async def lifespan(_: FastAPI):  # noqa: ANN201
    """Start and stop the engine with the application."""
    async with engine:
        yield


app = FastAPI(lifespan=lifespan)


class Query(BaseModel):
    """A request's body."""

    text: str


@app.post("/search")
async def search(query: Query) -> dict[str, object]:
    """Return the best ten documents."""
    vectors, _ = await engine.embed(sentences=[query.text])
    scores, found = index.search(np.asarray(vectors, dtype=np.float32), 10)
    return {"hits": [[ids[i], float(score)] for i, score in zip(found[0], scores[0], strict=True)]}


uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning", timeout_keep_alive=300)
