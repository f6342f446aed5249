"""What an image is, and whether it can be used: one decode decides, as it will in training.

`check_image` goes by the bytes and not by the name. With `resize_longest` an image that is larger is also written anew.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import Image

from common.images import ImageError, opened
from data_prep.row_shapes import Refused

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2", "SUN": "ras", "PIXAR": "pxr"}
"""Where they differ from the lower-case format. MPO: what Pillow calls a JPEG with more pictures behind the first."""
_TAKEN = (
    "blp bmp cur dcx dds dib fli gbr gif icns ico im jp2 jpg msp pcd pcx png ppm psd pxr ras sgi tga tif webp xbm xpm"
)
WEBDATASET_EXTENSIONS = frozenset(_TAKEN.split())
"""Those that webdataset's own decoder takes for images. Source: webdataset 1.0.2, autodecode.py."""
LOSSY = ("JPEG", "MPO", "WEBP")
JPEG_QUALITY = 90
MODES_OF_EIGHT_BITS = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LA", "PA", "RGBA", "La", "RGBa")


def is_left_as_bytes(image_format: str) -> bool:
    """Returns whether plain webdataset readers do not decode images of a format."""
    return ImageInfo(image_format, 0, 0).extension not in WEBDATASET_EXTENSIONS


class ImageInfo(NamedTuple):
    """What an image has been shown to be."""

    format: str
    width: int
    height: int

    @property
    def extension(self) -> str:
        """The file name extension that tells the format, whatever the file was called."""
        return EXTENSIONS.get(self.format, self.format.lower())


def check_image(data: bytes, path: str, decode: bool = True) -> ImageInfo:
    """Returns what an image is, after decoding it in full (the first picture of an animation) as training will.

    One decode on one object decides: after a failed `load()` Pillow hands out the partial pixels without an error.

    Args:
        data: The bytes of the file.
        path: Names it in errors.
        decode: False reads the header alone, and lets damage behind it pass.

    Raises:
        Refused: It does not decode, is cut short, is empty, or has more than `MAX_PIXELS` pixels.
    """
    with _opened(data, path) as image:
        if decode:
            # A JPEG's every coefficient is read, which is where damage shows; its colors need not be made as well.
            image.draft("L", image.size)
            _load(image)
        return _info(image)


def shrink_image(data: bytes, path: str, resize_longest: int) -> tuple[bytes, ImageInfo, ImageInfo]:
    """Returns the bytes to keep, what they are and what they were; no side is longer than `resize_longest` pixels.

    An image that fits is kept as it came. A larger one is decoded, resized with antialiasing and encoded again: lossy
    formats as JPEG, others and those with transparency as PNG. Orientation and colour profiles, which training ignores,
    are not carried over. Images of more than eight bits a channel stay as they are.

    Raises:
        Refused: As `check_image`.
    """
    with _opened(data, path) as image:
        _load(image)
        info, scale = _info(image), resize_longest / max(image.size)
        if scale >= 1 or image.mode not in MODES_OF_EIGHT_BITS:
            return data, info, info
        clear = image.has_transparency_data
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        small = image.convert("RGBA" if clear else "L" if image.mode in ("1", "L") else "RGB")
        small = small.resize(size, Image.Resampling.BICUBIC)
        small.info.pop("icc_profile", None)
        stream = io.BytesIO()
        image_format = "JPEG" if info.format in LOSSY and not clear else "PNG"
        small.save(stream, image_format, **({"quality": JPEG_QUALITY} if image_format == "JPEG" else {}))
        return stream.getvalue(), ImageInfo(image_format, *size), info


@contextmanager
def _opened(data: bytes, path: str) -> Iterator[Image.Image]:
    """Yields the image with its header read; every way in which it may fail in the block becomes a refusal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large sizes and odd metadata: the pixels decide
            with opened(data) as image:
                yield image
    except ImageError as error:
        raise Refused(error.kind, str(error), path) from None


def _load(image: Image.Image) -> None:
    image.load()
    if image.mode not in ("RGB", "LAB"):  # Pillow has no conversion for LAB; training brings its own
        image.convert("RGB")


def _info(image: Image.Image) -> ImageInfo:
    return ImageInfo(str(image.format), image.width, image.height)
