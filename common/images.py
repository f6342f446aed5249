"""The one place that opens an image file: sharding, training and evaluation take and refuse the same ones.

Whatever Pillow decodes is an image, by its bytes and not by its name. Texts and colour profiles of a PNG are left out
before Pillow sees them: no pixel depends on them, and Pillow refuses a file whose comment unpacks to a megabyte, as
screenshots and renders have.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from PIL import Image, ImageFile, UnidentifiedImageError

MAX_PIXELS = 178_956_970
"""Source: the size at which Pillow itself raises DecompressionBombError (twice `Image.MAX_IMAGE_PIXELS`)."""
MAX_IMAGE_BYTES = 2 << 30
"""No file of an image is larger: that is twice what so many pixels of four channels take without compression."""
COMMON_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
EXCLUDED_FORMATS = {
    "EPS",  # runs Ghostscript
    "FITS",  # unpacks without a limit
    "IPTC",  # opens what it holds as any format
    *("BUFR", "GRIB", "HDF5", "MPEG", "WMF"),  # are recognised, not decoded
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


class ImageError(ValueError):
    """A file that is no image to us; `kind` is not_an_image, image_too_large or image_damaged."""

    def __init__(self, kind: str, reason: str):
        """The message is `reason`."""
        super().__init__(reason)
        self.kind = kind


@cache
def formats() -> tuple[str, ...]:
    """Returns Pillow's names of the formats that are images here, frequent ones first."""
    Image.init()
    return *COMMON_FORMATS, *sorted(set(Image.OPEN) - EXCLUDED_FORMATS - set(COMMON_FORMATS))


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Yields the image that a file's bytes are, with its header read.

    Raises:
        ImageError: It is no image, has more than `MAX_PIXELS` pixels, or decoding it in the block fails in any way.
    """
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "something told Pillow to fill truncated images with gray"
    try:
        image = Image.open(io.BytesIO(without_texts(data)), formats=formats())
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
        yield image
    except UnidentifiedImageError:  # its own message holds a memory address
        raise ImageError("not_an_image", f"not an image that can be read ({_start(data)})") from None
    except Image.DecompressionBombError:
        raise ImageError("image_too_large", f"more than {MAX_PIXELS} pixels") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes
        raise ImageError("image_damaged", f"image does not decode: {type(error).__name__}: {error}") from None


def load_image(data: bytes) -> Image.Image:
    """Returns the image that a file's bytes are, decoded; of an animation the first picture.

    One `load()` on one object decides: after one that failed Pillow hands out the partial pixels without an error.

    Raises:
        ImageError: As `opened`.
    """
    with opened(data) as image:
        image.load()
        return image


def without_texts(data: bytes) -> bytes:
    """Returns a PNG without its texts and its colour profile, all else as it stands; any other file as it is.

    Source: PNG specification, 5.3: a signature of 8 bytes, then chunks of length, type, data and CRC.
    """
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, start, position = [], 0, len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        num_bytes, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + num_bytes
        if kind in PNG_TEXTS and end <= len(data):
            kept.append(data[start:position])
            start = end
        position = end
    return b"".join([*kept, data[start:]]) if kept else data


def _start(data: bytes) -> str:
    return f"{len(data)} bytes, beginning {ascii(data[:16])[1:]}" if data else "an empty file"
