"""From a torch module over token ids to an ONNX graph, and the graph's fusions."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import onnx
import torch
from torch import nn

OPSET = 17


def trace(module: nn.Module, inputs: Sequence[str], output: str) -> onnx.ModelProto:
    """Trace a copy of a module whose attention is written out, so that it can be fused.

    The newer exporter (``dynamo=True``) takes six times longer, and its graph does not match the fusions.

    Args:
        module: Holds a transformer; it is not changed.
        inputs: The names of what ``forward`` takes, in its order, each int64 ``[B, L]``: ``attention_mask`` and
            others, of which zeros and ones are valid values.
        output: The name of what ``forward`` gives, whose first axis is ``B``.

    Raises:
        Exception: the module has an operator that ONNX lacks, or is larger than a graph may be; torch's
            errors share no base.
    """
    module = copy.deepcopy(module).eval().cpu()
    for part in module.modules():
        if hasattr(part, "set_attn_implementation"):
            cast("Any", part).set_attn_implementation("eager")
    # Two rows and padding: a single full row would be traced into constants.
    example = {name: torch.ones(2, 8, dtype=torch.int64) for name in inputs}
    example["attention_mask"][1, 5:] = 0
    buffer = io.BytesIO()
    with _without_warnings():
        torch.onnx.export(
            module,
            tuple(example.values()),
            cast("Any", buffer),
            input_names=list(inputs),
            output_names=[output],
            dynamic_axes={**{name: {0: "batch", 1: "length"} for name in inputs}, output: {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )
    return onnx.load_model_from_string(buffer.getvalue())


def fuse(graph: onnx.ModelProto, config: Any) -> onnx.ModelProto:
    """Fuse attention, layer norms and activations; a graph that BERT's patterns do not match stays as it is.

    Args:
        graph: It is not changed.
        config: The transformer's configuration.
    """
    from onnxruntime.transformers.optimizer import optimize_model

    copied = onnx.ModelProto()
    copied.CopyFrom(graph)
    with _without_warnings():
        return optimize_model(
            copied,
            model_type="bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            opt_level=0,
        ).model


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence tracer and optimizer: they warn of every pattern they do not know, and callers measure the result."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
