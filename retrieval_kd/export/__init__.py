"""From a torch encoder to one ONNX graph, and the gate that compares the two."""
