"""mosec (a Rust front, a Python worker, dynamic batches of up to 8) with the same ONNX file. ``WORLD PORT``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mosec import Server, Worker

if len(sys.argv) == 3 and sys.argv[2].isdigit():
    os.environ["RKD_WORLD"], port = sys.argv[1], sys.argv[2]
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", port, "--timeout", "30000"]


class Search(Worker):
    """Encode and search."""

    def __init__(self) -> None:
        from onnx_faiss import Pipeline

        self._pipeline = Pipeline(Path(os.environ["RKD_WORLD"]))

    def forward(self, data: list[dict[str, str]]) -> list[dict[str, object]]:
        """Answer a batch."""
        return [{"hits": hits} for hits in self._pipeline.search([one["text"] for one in data])]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Search, num=1, max_batch_size=8, max_wait_time=1)
    server.run()
