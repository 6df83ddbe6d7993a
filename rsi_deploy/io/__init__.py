"""Safe reading and writing of files: ONNX models, archives, checkpoints, pictures, manifests, locks and bundles."""
