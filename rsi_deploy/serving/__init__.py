"""Serving compressed models on one box: the Open Inference Protocol v2 over HTTP and gRPC.

    client --HTTP or gRPC--> front process: decode, check, route, batch --frames over a socket--> worker processes
                                                                                                    onnxruntime

The model part (`bundles`, `signature`, `tensors`, `model`) knows no transport and no process but its own, so that
another engine can use it. `worker`, `workers` and `batches` are the machinery of this server; `http_*` and `grpc_*` are
its two transports; `service` is what both of them call; `front` has the sockets.

With `--engine ray` the sockets are Ray Serve's, and all behind them is one replica of many (`ray_app`, `ray_engine`,
`merging`). What `package --target ray-serve` writes is an application of its own: it must run where there is no
rsi-deploy.

Why no serving library is underneath (looked at in November 2026, in environments of their own):

    kserve 0.21      living; HTTP, gRPC and binary tensors, 0.75 ms of CPU a request. But a request that names a version
                     gets 501 "Model versioning not supported yet"; no dynamic batching in its Python server; needs
                     protobuf < 7 and psutil < 6, which constraints.txt contradicts; 70 packages, Kubernetes' among them
    mlserver 1.7.1   last release June 2025; protobuf < 7, fastapi < 0.116; no binary tensors over HTTP, which
                     tritonclient sends unless told otherwise
    litserve 0.2.19  living, light; no Open Inference Protocol
    bentoml 1.4      living; no Open Inference Protocol

So the parts are taken from where those libraries take them: `uvicorn` and `starlette` for HTTP, `grpcio` for gRPC,
`prometheus_client` for metrics, `orjson` for JSON; and the protocol's gRPC messages from `tritonclient`, the client
that the server must please. Written here is what is left: the onnxruntime part, batching, workers and routing.
"""

KEY_VARIABLE = "RSI_DEPLOY_API_KEY"
"""Environment variable with the key that clients must send."""
