"""Models that read text: decoders that generate through onnxruntime-genai, and encoders that give embeddings."""
