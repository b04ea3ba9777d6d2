"""A sequence classifier as a graph under onnxruntime: what a CPU scores with."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import onnx
import torch
from torch import Tensor, nn

from retrieval_kd.encoders.onnx import open_session
from retrieval_kd.export.graph import fuse, trace

OUTPUT = "logits"


def classifier_graph(model: nn.Module, inputs: Sequence[str]) -> onnx.ModelProto:
    """Return a classifier as a fused graph: int64 ``[B, L]`` by the names of ``inputs``, to float32 ``[B, labels]``.

    Raises:
        Exception: it has no graph, see :func:`retrieval_kd.export.graph.trace`.
    """
    return fuse(trace(_Positional(model, inputs), inputs, OUTPUT), model.config)


class OnnxClassifier:
    """Called like the classifier it was made of, without gradients."""

    def __init__(self, model: nn.Module, inputs: Sequence[str]) -> None:
        """Trace and fuse a classifier, which takes seconds and is not written to disk.

        Args:
            model: A transformers sequence classifier; it is not changed.
            inputs: The keyword arguments that it will be called with.

        Raises:
            Exception: it has no graph, see :func:`retrieval_kd.export.graph.trace`.
            ArtifactError: onnxruntime cannot run its graph.
        """
        # torch's setting holds for its substitute too.
        graph = classifier_graph(model, inputs).SerializeToString()
        self._session = open_session(graph, torch.get_num_threads())

    def __call__(self, **inputs: Tensor) -> SimpleNamespace:
        """Return an object whose ``logits``, float32 ``[B, labels]``, are those of the classifier."""
        (values,) = self._session.run([OUTPUT], {name: tensor.numpy() for name, tensor in inputs.items()})
        return SimpleNamespace(logits=torch.from_numpy(values))


class _Positional(nn.Module):
    """Tracing passes inputs by position, and families differ in the order of theirs."""

    def __init__(self, model: nn.Module, inputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.inputs = tuple(inputs)

    def forward(self, *values: Tensor) -> Tensor:
        return cast("Tensor", self.model(**dict(zip(self.inputs, values, strict=True))).logits)
