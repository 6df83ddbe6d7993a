"""Files, read and written safely: ONNX models, archives, checkpoints, pictures, manifests, locks, bundles."""
