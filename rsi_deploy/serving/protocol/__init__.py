"""The Open Inference Protocol v2: requests, tensors, images and refusals."""
