"""onnxruntime: sessions, providers, feeds, traces of a run, parity of two models, and the facts of the machine."""
