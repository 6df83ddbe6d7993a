"""`--target kserve`: an InferenceService, and the model repository for its storage.

DIR/inferenceservice.yaml    serving.kserve.io/v1beta1, run by KServe's Triton runtime (Open Inference Protocol v2)
DIR/models/                  the model repository; copy it to storageUri
DIR/README.md
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsi_deploy.core.errors import UsageError
from rsi_deploy.packaging.result import tensor_lines
from rsi_deploy.packaging.triton import Entry, write_repository
from rsi_deploy.packaging.triton_config import TritonSettings
from rsi_deploy.packaging.yaml_text import yaml_text

LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class KserveSettings:
    """Storage and resources of the InferenceService.

    Attributes:
        storage_uri: URI to which `models/` is copied: s3://, gs://, pvc://, https://...
        replicas: fewest and most replicas; 0 as the fewest scales to zero.
        cpus: CPUs of each replica.
        memory: memory of each replica in Kubernetes' notation, such as "2Gi".
    """

    storage_uri: str
    replicas: tuple[int, int]
    cpus: int
    memory: str


def check_label(name: str) -> None:
    """Check that Kubernetes accepts a name.

    Raises:
        UsageError: the name is no DNS label.
    """
    if not LABEL.fullmatch(name):
        raise UsageError(
            f"Kubernetes needs a name of at most 63 small letters, digits and -, a letter first, but got {name!r}; "
            "choose another with --name"
        )


def inference_service(name: str, settings: KserveSettings, triton: TritonSettings) -> dict[str, Any]:
    """Return the InferenceService as a mapping."""
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
        ModelError: Triton does not support the type or shape of a tensor.
    """
    write_repository(folder / "models", [entry], triton)
    text = yaml_text(inference_service(entry.name, settings, triton))
    (folder / "inferenceservice.yaml").write_text(text, encoding="utf-8", newline="\n")
    (folder / "README.md").write_text(_readme(entry, settings), encoding="utf-8")


def _readme(entry: Entry, settings: KserveSettings) -> str:
    model, name = entry.versions[-1], entry.name
    lines: Sequence[str] = [
        f"# {model.facts.source.model}, compressed, for KServe",
        "",
        f"Copy the contents of `models/` to `{settings.storage_uri}`, then:",
        "",
        "```sh",
        "kubectl apply -f inferenceservice.yaml",
        f"kubectl wait --for=condition=Ready inferenceservice/{name} --timeout=300s",
        f"curl -s \"$(kubectl get inferenceservice {name} -o jsonpath='{{.status.url}}')/v2/models/{name}\"",
        "```",
        "",
        "KServe's runtime `kserve-tritonserver` runs it with Triton's onnxruntime backend (Open Inference Protocol).",
        "For a canary next to the present service of this name, add `canaryTrafficPercent: 10` under `predictor:`.",
        "",
        *tensor_lines(model),
        "",
    ]
    return "\n".join(lines)
