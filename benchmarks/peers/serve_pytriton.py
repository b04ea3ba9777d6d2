"""nvidia-pytriton (Triton's HTTP front and dynamic batcher) with the same ONNX file. ``WORLD PORT``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from onnx_faiss import Pipeline
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

WORLD, PORT = Path(sys.argv[1]), int(sys.argv[2])
pipeline = Pipeline(WORLD)


@batch
def search(text: np.ndarray) -> dict[str, np.ndarray]:
    """Answer a batch."""
    answers = pipeline.search([row[0].decode() for row in text])
    return {"hits": np.array([[json.dumps(hits).encode()] for hits in answers], dtype=object)}


with Triton(config=TritonConfig(http_port=PORT, grpc_port=PORT + 1, metrics_port=PORT + 2, log_verbose=0)) as triton:
    triton.bind(
        model_name="search",
        infer_func=search,
        inputs=[Tensor(name="text", dtype=bytes, shape=(1,))],
        outputs=[Tensor(name="hits", dtype=bytes, shape=(1,))],
        config=ModelConfig(max_batch_size=8, batcher=DynamicBatcher()),
    )
    triton.serve()
