"""From a torch module over token ids to an ONNX graph, and the graph's fusions."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

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


def token_sum(table: Tensor, inputs: Sequence[str], output: str) -> onnx.ModelProto:
    """Write the shortest graph that adds up token vectors and scales the sum to unit length.

    In a query of a static encoder, walking from operator to operator takes onnxruntime longer than their work: the
    traced graph has 25, this one 6. The sum is a product with the mask, for ``ReduceSum`` adds up in another order in a
    batch.

    Args:
        table: One vector a token, float ``[V, d]``.
        inputs: The names of token ids and mask, int64 ``[B, L]`` each.
        output: The name of the vectors, ``[B, d]``.
    """
    ids, mask = inputs
    nodes = [
        helper.make_node("Gather", ["table", ids], ["vectors"]),
        helper.make_node("Cast", [mask], ["kept"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["kept", "row"], ["rows"]),
        helper.make_node("MatMul", ["rows", "vectors"], ["sums"]),
        helper.make_node("LpNormalization", ["sums"], ["units"], axis=-1, p=2),
        helper.make_node("Squeeze", ["units", "row"], [output]),
    ]
    graph = helper.make_graph(
        nodes,
        "token_sum",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in inputs],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", table.shape[1]])],
        [
            numpy_helper.from_array(table.detach().float().cpu().numpy(), "table"),
            numpy_helper.from_array(np.array([1], np.int64), "row"),
        ],
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=helper.find_min_ir_version_for([opset]))


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
