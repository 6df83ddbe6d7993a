"""Read a config.pbtxt with Triton's own protobuf and print it as JSON. Runs in the engine's environment.

python check_config.py CONFIG.pbtxt
"""

import json
import sys
from pathlib import Path


def main(path):
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    config = text_format.Parse(Path(path).read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    print(json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True)))


if __name__ == "__main__":
    main(sys.argv[1])
