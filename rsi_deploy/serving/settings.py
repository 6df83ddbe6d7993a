"""The settings of `serve`."""

from typing import Any, Literal

from rsi_deploy.core.settings.base import FileName, Seconds, SecondsOrOff, Settings, Share, Size, setting
from rsi_deploy.serving import KEY_VARIABLE

FIRST: dict[str, Any] = {"first": True}


class AddressConfig(Settings, panel="Address"):
    """The addresses of the server, and the key of its clients."""

    host: str = setting("127.0.0.1", "Address to listen on.", option=FIRST)
    http_port: int = setting(8000, "Port of HTTP; 0 takes a free one.", option=FIRST, ge=0, le=65535)
    grpc_port: int = setting(8001, "Port of gRPC; 0 takes a free one.", option=FIRST, ge=0, le=65535)
    grpc: bool = setting(True, "Serve gRPC.", option=FIRST | {"off": "Serve HTTP alone."})
    api_key_file: FileName | None = setting(
        None, f"A file with the key that clients must send; or set ${KEY_VARIABLE}.", option=FIRST
    )


class WorkersConfig(Settings, panel="Workers"):
    """The worker processes and their batches."""

    workers: int | None = setting(None, "Processes that run models. (default: 2; 1 on one core)", option=FIRST, ge=1)
    threads: int | None = setting(None, "Threads of each worker. (default: the cores, shared out)", option=FIRST, ge=1)
    provider: str = setting("cpu", "onnxruntime provider: cpu, cuda, ...", option=FIRST)
    max_batch: int = setting(16, "Most rows that are joined; 1 joins none.", option=FIRST, ge=1)
    batch_delay: SecondsOrOff = setting(0.002, "Longest time that a request waits for others.", option=FIRST)
    latency_bound: Seconds = setting(
        2.0, "A request that would take longer is refused with 429: try again later.", option=FIRST
    )


class TextLimitsConfig(Settings, panel="Language models"):
    """Limits on generated text."""

    max_tokens: int = setting(1024, "Most tokens that a request may generate.", ge=1)
    generation_wait: Seconds = setting(
        60.0, "Longest time that a request to generate text waits for a worker; then it is refused."
    )


class RolloutConfig(Settings, panel="Rollout"):
    """Canary and shadow, and the reload of replaced bundles."""

    canary: str = setting(
        "", "A model that answers a share of the requests.", option=FIRST | {"metavar": "[NAME=]PATH"}
    )
    canary_share: Share | None = setting(None, "Share of the canary.", option=FIRST | {"metavar": "10%"})
    shadow: str = setting(
        "", "A model that is compared with the one that answers.", option=FIRST | {"metavar": "[NAME=]PATH"}
    )
    reload_seconds: SecondsOrOff = setting(
        1.0, "Time between checks for replaced bundles; off disables them.", option={"flag": "--reload-every"}
    )


class LimitsConfig(Settings, panel="Limits"):
    """Limits on requests, and the access log."""

    max_body: Size = setting(64_000_000, "Most bytes of a request.")
    max_json: Size = setting(8_000_000, "Most bytes of JSON in a request.")
    access_log: str = setting("-", "File for one JSON object a request; - is stderr.", option={"metavar": "FILE|-|off"})
    drain_seconds: Seconds = setting(
        30.0, "Time for accepted requests when the server ends.", option={"flag": "--drain"}
    )


class RayConfig(Settings, panel="Engine ray"):
    """A Ray Serve application instead of the server's own processes."""

    engine: Literal["own", "ray"] = setting(
        "own", "ray: a Ray Serve application, whose replicas grow with the load. [extra: ray]"
    )
    ray: str = setting(
        "", "Address of a cluster. (default: local, on this machine)", option={"metavar": "ADDRESS|local"}
    )
    replicas: str = setting("", "The fewest and the most replicas. (default: 1-4)", option={"metavar": "1-4"})
    write_config: str = setting(
        "", "Write the config for `serve deploy` instead of serving.", option={"metavar": "FILE"}
    )


class ServeConfig(AddressConfig, WorkersConfig, TextLimitsConfig, RolloutConfig, LimitsConfig, RayConfig):
    """The settings of `serve`."""
