"""Send every sample of the feeds as its own request, all at once; print the answers. Runs in the engine's environment.

    python ask_many.py ADDRESS MODEL FEEDS.npz

It prints {"answers": [a list or error text for each sample], "requests": count, "runs": number of model runs}.
"""

import json
import sys

import numpy as np


def main(address, model, feeds):
    import tritonclient.http as triton
    from tritonclient.utils import InferenceServerException, np_to_triton_dtype

    with np.load(feeds) as file:
        arrays = {name: file[name] for name in file.files}
    count = len(next(iter(arrays.values())))
    client = triton.InferenceServerClient(address, concurrency=count, network_timeout=120, connection_timeout=120)
    before = client.get_inference_statistics(model)["model_stats"][-1]
    sent = []
    for at in range(count):
        inputs = []
        for name, array in arrays.items():
            sample = array[at : at + 1]
            inputs.append(triton.InferInput(name, sample.shape, np_to_triton_dtype(sample.dtype)))
            inputs[-1].set_data_from_numpy(sample)
        sent.append(client.async_infer(model, inputs))
    name = client.get_model_metadata(model)["outputs"][0]["name"]
    answers = []
    for request in sent:
        try:
            answers.append(request.get_result().as_numpy(name).tolist())
        except InferenceServerException as error:
            answers.append(str(error))
    after = client.get_inference_statistics(model)["model_stats"][-1]
    runs = after["execution_count"] - before["execution_count"]
    print(json.dumps({"answers": answers, "requests": count, "runs": runs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
