"""From the bytes of one image file to a model's input, by the preprocessing that the bundle carries."""

import io

from rsi_deploy.errors import UsageError
from rsi_deploy.gateway.pictures import TooLargeError, with_picture
from rsi_deploy.measure.preprocess import Preprocessing
from rsi_deploy.serving.refusal import Refusal
from rsi_deploy.serving.requests import Request
from rsi_deploy.serving.signature import Signature

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels that a model takes -> Pillow's mode


def image_request(data: bytes, preprocessing: Preprocessing | None, signature: Signature, model: str) -> Request:
    """The request that asks a model about one image; orientation tags are ignored, as in `eval`.

    Args:
        data: a file that Pillow can read.
        preprocessing: of the model.
        signature: of the model, which must take one tensor of pictures `(N, C, H, W)` or `(N, H, W, C)`.
        model: what messages call it.

    Raises:
        Refusal: 400, no image, or a model that takes none or does not say how; 413, too many pixels.
    """
    if preprocessing is None:
        raise Refusal(400, f"{model} does not say how pictures become its inputs; export it with a preprocessing")
    if len(signature.inputs) != 1 or len(signature.inputs[0].shape) != 4:
        raise Refusal(400, f"{model} takes no pictures but {'; '.join(map(str, signature.inputs))}; post to /infer")
    (spec,) = signature.inputs
    channels = spec.shape[3 if preprocessing.layout == "NHWC" else 1]
    try:
        mode = _MODES.get(channels, "RGB") if isinstance(channels, int) else "RGB"
        inputs = with_picture(io.BytesIO(data), lambda picture: preprocessing.apply_image(picture.convert(mode)))
    except UsageError as error:
        raise Refusal(400, str(error)) from None
    except TooLargeError as error:
        raise Refusal(413, str(error)) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise Refusal(400, f"the body cannot be read as an image: {str(error)[:160]}") from None
    return Request(feeds={spec.name: inputs[None]}, outputs={})
