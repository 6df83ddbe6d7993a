"""`--target kserve`: an InferenceService, and the model repository that its storage must hold.

    DIR/inferenceservice.yaml    serving.kserve.io/v1beta1, run by KServe's Triton runtime (Open Inference Protocol v2)
    DIR/models/                  what storageUri points to; copy it there
    DIR/README.md

The YAML is written as JSON values under YAML keys, which every YAML parser reads alike.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsi_deploy.core.errors import UsageError
from rsi_deploy.packaging.result import described
from rsi_deploy.packaging.triton import Entry, write_repository
from rsi_deploy.packaging.triton_config import TritonSettings
from rsi_deploy.packaging.yaml_text import yaml_text

LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class KserveSettings:
    """What the cluster is asked for.

    Attributes:
        storage_uri: where `models/` will lie: s3://, gs://, pvc://, https://...
        replicas: fewest and most; 0 as the fewest scales to zero.
        cpus: of each replica.
        memory: of each replica, as Kubernetes writes it: "2Gi".
    """

    storage_uri: str
    replicas: tuple[int, int]
    cpus: int
    memory: str


def check_label(name: str) -> None:
    """Refuse what Kubernetes would.

    Raises:
        UsageError: no DNS label.
    """
    if not LABEL.fullmatch(name):
        raise UsageError(
            f"Kubernetes wants small letters, digits and - in a name (at most 63, a letter first), but got {name!r}; "
            "give another with --name"
        )


def inference_service(name: str, settings: KserveSettings, triton: TritonSettings) -> dict[str, Any]:
    """The InferenceService as an object."""
    resources = {"cpu": str(settings.cpus), "memory": settings.memory}
    if triton.device == "gpu":
        resources["nvidia.com/gpu"] = "1"
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {
            "predictor": {
                "minReplicas": settings.replicas[0],
                "maxReplicas": settings.replicas[1],
                "model": {
                    "modelFormat": {"name": "triton"},
                    "runtime": "kserve-tritonserver",
                    "protocolVersion": "v2",
                    "storageUri": settings.storage_uri,
                    "resources": {"requests": resources, "limits": resources},
                },
            }
        },
    }


def write_kserve(folder: Path, entry: Entry, settings: KserveSettings, triton: TritonSettings) -> None:
    """Write the InferenceService, the repository and the README into `folder`.

    Raises:
        ModelError: a tensor of a type or shape that Triton has not.
    """
    write_repository(folder / "models", [entry], triton)
    text = yaml_text(inference_service(entry.name, settings, triton))
    (folder / "inferenceservice.yaml").write_text(text, encoding="utf-8", newline="\n")
    (folder / "README.md").write_text(_readme(entry, settings), encoding="utf-8")


def _readme(entry: Entry, settings: KserveSettings) -> str:
    model, name = entry.versions[-1], entry.name
    lines: Sequence[str] = [
        f"# {model.report.source.model}, compressed, for KServe",
        "",
        f"Copy what is in `models/` to `{settings.storage_uri}`, then:",
        "",
        "```sh",
        "kubectl apply -f inferenceservice.yaml",
        f"kubectl wait --for=condition=Ready inferenceservice/{name} --timeout=300s",
        f"curl -s \"$(kubectl get inferenceservice {name} -o jsonpath='{{.status.url}}')/v2/models/{name}\"",
        "```",
        "",
        "KServe's own runtime `kserve-tritonserver` runs it: Triton's onnxruntime backend, Open Inference Protocol v2.",
        "To roll it out beside what runs under this name now, add `canaryTrafficPercent: 10` under `predictor:` first.",
        "",
        *described(model),
        "",
    ]
    return "\n".join(lines)
