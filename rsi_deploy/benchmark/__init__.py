"""Latency of ONNX models: interleaved blocks, matrices of configurations, load generation, profiles, gates for CI."""
