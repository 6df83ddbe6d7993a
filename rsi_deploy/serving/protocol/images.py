"""Requests with an image file: the bundle's preprocessing turns it into the model's input."""

import io

import numpy as np

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.feeding import as_input
from rsi_deploy.data.model_pictures import ModelPictures
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.io.pictures import TooLargeError, UnknownRangeError, read_picture
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.requests import InferRequest
from rsi_deploy.serving.protocol.signature import Signature


def image_request(data: bytes, preprocessing: Preprocessing | None, signature: Signature, model: str) -> InferRequest:
    """Return the inference request for one image, which is read as `eval` reads it.

    Args:
        data: contents of a file that Pillow can read.
        preprocessing: preprocessing of the model; None for a model that takes 8-bit pictures.
        signature: inputs of the model: one tensor of pictures `(N, C, H, W)`, `(N, H, W, C)` or `(N, H, W)`.
        model: name of the model in messages.

    Raises:
        Refusal: 400, the data is no image, or the model takes no pictures or has no preprocessing; 413, too many
            pixels.
    """
    takes_raw = all(spec.dtype == np.uint8 for spec in signature.inputs)
    if preprocessing is None and not takes_raw:
        raise Refusal(400, f"{model} has no preprocessing for pictures; export it with one: --mean, --std, --resize")
    if len(signature.inputs) != 1 or len(signature.inputs[0].shape) not in (3, 4):
        takes = "; ".join(map(str, signature.inputs))
        raise Refusal(400, f"{model} does not take pictures but {takes}; send it to /infer")
    (spec,) = signature.inputs
    try:
        pictures = ModelPictures.of_input(preprocessing, spec, model)
        picture = pictures.apply_file(read_picture(io.BytesIO(data)))
        inputs = as_input(picture[None], spec, option="image", model=model)
    except UsageError as error:
        raise Refusal(400, str(error)) from None
    except UnknownRangeError as error:
        raise Refusal(400, f"the image has {error}; send it with 8 or 16 bits a channel") from None
    except TooLargeError as error:
        raise Refusal(413, str(error)) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise Refusal(400, f"the body cannot be read as an image: {str(error)[:160]}") from None
    return InferRequest(feeds={spec.name: inputs}, outputs={})
