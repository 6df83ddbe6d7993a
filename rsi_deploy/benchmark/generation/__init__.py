"""Models that generate text: time to the first token, prefill and decode, through onnxruntime-genai."""
