"""Latency of ONNX models: interleaved blocks, matrices of conditions, load generation, profiles, gates for CI."""
