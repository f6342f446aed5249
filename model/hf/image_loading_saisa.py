"""An image in any form that callers hand over -> a Pillow image with its pixels as stored.

    str               a file, a URL (http, https, file, data), or the base64 text of an image file
    pathlib.Path      a file
    bytes             the content of an image file
    array or tensor   [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels: bool; uint8; uint16 up to 65535; other
                      integers from 0 to 255; floats from 0 to 1, or from 0 to 255 where one is above 1
    Pillow image      itself

transformers' own `load_image` turns an image by its EXIF orientation and drops its transparency; training, like LLaVA,
does neither turn nor, unlike LLaVA, show what lies under transparency. Nothing is read but what the caller names.
"""

import base64
import io
import os
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format

URL_SCHEMES = ("http://", "https://", "file://", "data:")
FORMS = "a file, a URL (http, https, file, data), base64 text, bytes, an array, a tensor or a Pillow image"
TIMEOUT_SECONDS = 60
# Formats of Pillow that run Ghostscript (EPS), open what they hold as any format, or are recognised and not decoded.
EXCLUDED_FORMATS = {"EPS", "FITS", "IPTC", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}


def load_image(source: Any, input_data_format: str | None = None) -> Image.Image:
    """Returns an image in any of the forms above as a Pillow image, not turned and not converted.

    Args:
        source: the image.
        input_data_format: "channels_first" or "channels_last" for an array; None finds out, as transformers does.

    Raises:
        ValueError: there is no such file, no answer, no image in the text, or values have no clear range.
        TypeError: it is none of the forms.
        OSError: a file is not an image that Pillow reads.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    if isinstance(source, np.ndarray):
        return _from_array(source, input_data_format)
    if isinstance(source, bytes):
        return _open(io.BytesIO(source))
    if isinstance(source, os.PathLike):
        return _open(Path(source))
    if isinstance(source, str):
        return _from_text(source)
    raise TypeError(f"an image is of type {type(source).__name__}; give {FORMS}")


def list_images(images: Any) -> list[Any]:
    """Returns one image, a batch in an array [N, ...], or lists of these, as one flat list."""
    if images is None:
        return []
    if isinstance(images, list | tuple) or (isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4):
        return [image for item in images for image in list_images(item)]
    return [images]


def _open(file: Any) -> Image.Image:
    Image.init()
    return Image.open(file, formats=[name for name in Image.ID if name not in EXCLUDED_FORMATS])


def _from_text(text: str) -> Image.Image:
    shown = text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"
    if text.startswith(URL_SCHEMES):
        try:
            with urllib.request.urlopen(text, timeout=TIMEOUT_SECONDS) as response:
                return _open(io.BytesIO(response.read()))
        except (OSError, ValueError) as error:
            raise ValueError(f"{shown}: no image there ({error})") from None
    if os.path.isfile(text):
        return _open(text)
    try:
        return _open(io.BytesIO(base64.b64decode("".join(text.split()), validate=True)))
    except (OSError, ValueError):
        raise ValueError(f"{shown!r}: no such file, and not the base64 text of an image; give {FORMS}") from None


def _from_array(values: np.ndarray, input_data_format: str | None) -> Image.Image:
    if values.size == 0 or values.ndim not in (2, 3):
        raise ValueError(f"an image is an array of shape {list(values.shape)}; give [H, W], [H, W, C] or [C, H, W]")
    if values.ndim == 3:
        if _channels_first(values, input_data_format):
            values = values.transpose(1, 2, 0)
        if values.shape[2] not in (1, 3, 4):
            raise ValueError(f"an image is an array of {values.shape[2]} channels; give 1, 3 or 4")
        values = values[:, :, 0] if values.shape[2] == 1 else values
    return Image.fromarray(np.ascontiguousarray(_to_uint8(values)))


def _channels_first(values: np.ndarray, input_data_format: str | None) -> bool:
    if input_data_format is None:
        shape = values.shape
        known = (1, 3) if shape[0] in (1, 3) or shape[2] in (1, 3) else (4,)
        try:
            input_data_format = infer_channel_dimension_format(values, num_channels=known)
        except ValueError:
            raise ValueError(f"an image is an array of shape {list(shape)}, with neither 1, 3 nor 4 channels") from None
    return ChannelDimension(input_data_format) == ChannelDimension.FIRST


def _to_uint8(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    kind, is_16_bit = values.dtype.kind, values.dtype == np.uint16
    if kind not in "biuf":
        raise ValueError(f"an image is an array of {values.dtype}; give integers or floats")
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= (65535 if is_16_bit else 255):  # also false for NaN
        raise ValueError(
            f"an image is an array of {values.dtype} from {low:g} to {high:g}; give 0 to 255, or floats from 0 to 1, "
            "before any normalisation"
        )
    scale = 1 / 257 if is_16_bit else 255.0 if kind == "b" or (kind == "f" and high <= 1) else 1.0
    return np.rint(values.astype(np.float64) * scale).astype(np.uint8)
