"""A server for compressed models on one machine: the Open Inference Protocol v2 over HTTP and gRPC, OpenAI's over HTTP.

    client --HTTP or gRPC--> front process: decode, check, route, batch --frames over a socket--> worker processes
                                                                                                    onnxruntime,
                                                                                                    onnxruntime-genai

- `bundles` and `catalog` find and check the models. `protocol` decodes requests and encodes answers.
- `language` generates text with decoders and makes embeddings with encoders.
- `engine` holds the worker processes and the batches in front of them.
- `service` is what both `transports` call; `front` owns the sockets.
- `ray` runs the same service as a Ray Serve application (`--engine ray`). Ray Serve then owns the sockets, and each
  replica is one whole service; `replica_counts` adds up what they count. `package --target ray-serve` writes another
  application, which also runs where rsi-deploy is not installed.

Why it is not built on a serving library (state of November 2026, each tried in its own environment):

    kserve 0.21      active; HTTP, gRPC and binary tensors, 0.75 ms of CPU a request. But it answers requests that name
                     a version with 501, its Python server has no dynamic batching, it needs protobuf < 7 and
                     psutil < 6 (constraints.txt has newer ones), and it installs 70 packages with Kubernetes' client
    mlserver 1.7.1   last release June 2025; protobuf < 7, fastapi < 0.116; no binary tensors over HTTP, which
                     tritonclient sends by default
    litserve 0.2.19  active, light; no Open Inference Protocol
    bentoml 1.4      active; no Open Inference Protocol

The server uses the parts that these libraries use: `uvicorn` and `starlette` for HTTP, `grpcio` for gRPC,
`prometheus_client` for metrics, `orjson` for JSON, and `tritonclient` for the protocol's gRPC messages.
"""

KEY_VARIABLE = "RSI_DEPLOY_API_KEY"
"""Environment variable with the key that clients must send."""
