"""ONNX models: factors for the sites of a graph, the split, and its verification."""
