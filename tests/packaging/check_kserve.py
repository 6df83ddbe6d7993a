"""Read an InferenceService into kserve's models, and print both as JSON. Runs in the engine's environment.

    python check_kserve.py INFERENCESERVICE.yaml

kserve's models drop unknown fields, so they are missing in the printed result.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace


def main(path):
    import kserve
    import kubernetes.client
    import yaml

    for name in dir(kubernetes.client):  # kserve's client does not find the models of Kubernetes itself
        if name.startswith("V1") and not hasattr(kserve.models, name):
            setattr(kserve.models, name, getattr(kubernetes.client, name))
    given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    client = kserve.ApiClient()
    made = client.deserialize(SimpleNamespace(data=json.dumps(given)), "V1beta1InferenceService")
    assert isinstance(made, kserve.V1beta1InferenceService)
    assert isinstance(made.spec.predictor.model, kserve.V1beta1ModelSpec)
    print(json.dumps({"given": given, "back": client.sanitize_for_serialization(made)}))


if __name__ == "__main__":
    main(sys.argv[1])
