"""Run the feeds of a file through tritonclient.http and save the answers. Runs in the engine's environment.

python ask_triton.py ADDRESS MODEL VERSION json|binary FEEDS.npz ANSWERS.npz
"""

import sys

import numpy as np


def main(address, model, version, way, feeds, answers):
    import tritonclient.http as triton
    from tritonclient.utils import np_to_triton_dtype

    client = triton.InferenceServerClient(address, network_timeout=120, connection_timeout=120)
    binary = way == "binary"
    with np.load(feeds) as arrays:
        inputs = []
        for name in arrays.files:
            array = arrays[name] if arrays[name].shape else arrays[name].reshape(1)  # Triton has no scalars
            if array.dtype.kind == "U":
                array = np.array([text.encode() for text in array.ravel()], object).reshape(array.shape)
            inputs.append(triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array, binary_data=binary)
    names = [output["name"] for output in client.get_model_metadata(model, version)["outputs"]]
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
    answer = client.infer(model, inputs, model_version=version, outputs=wanted)
    arrays = {name: answer.as_numpy(name) for name in names}
    np.savez(answers, **{name: decoded(array) if array.dtype.kind == "O" else array for name, array in arrays.items()})


def decoded(array):
    return np.array([text.decode() if isinstance(text, bytes) else text for text in array.ravel()]).reshape(array.shape)


if __name__ == "__main__":
    main(*sys.argv[1:])
