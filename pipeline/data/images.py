"""From the bytes of an image file to the pixels of the vision encoder, as fast as one core can.

    decode_image     bytes -> uint8[3, H, W], resized, padded or cropped, not yet normalised
    is_fast          whether a file takes the fast path, by its header alone

`SaisaImageProcessor` says what the pixels are, with Pillow; `exact` gives just these. Without it an ordinary JPEG, as
nearly every photo is, is decoded by torchvision, which has the same library inside as Pillow and gives the same pixels.
torch's resize applies the same filter, with vector instructions and coefficients of 16 bits, and so rounds a little
differently: one value in 300 is off by 1/255, one in a million by 2/255 (docs/benchmarks.md). Every other file takes
the exact path, and only the exact path refuses a file.

Nothing here sets the number of threads or any other state of the process.
"""

import io
from typing import cast

import torch
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.nn.functional import interpolate

from common.images import load_image
from model.hf.image_processing_saisa import MAX_INTERMEDIATE_PIXELS, SaisaImageProcessor

FILTERS = {2: "bilinear", 3: "bicubic"}
"""What torch calls Pillow's filters of these numbers; it lacks the others."""

END_OF_IMAGE = b"\xff\xd9"


def decode_image(data: bytes, processor: SaisaImageProcessor, exact: bool) -> Tensor:
    """Returns the pixels of an image as uint8[3, H, W]; in memory the colours may be innermost, until they are stacked.

    Args:
        data: The bytes of the file.
        processor: Says how to resize, pad and crop.
        exact: Whether they must be `processor.resize_to_uint8`'s own, bit for bit; it takes twice as long.

    Raises:
        ImageError: The file is truncated, damaged, too large or not an image.
        ValueError: A setting of the processor is not supported.
    """
    image_HW3 = _decode_jpeg(data) if not exact and is_fast(data, processor) else None
    if image_HW3 is not None:
        return _fit(image_HW3, processor)
    return processor.resize_to_uint8(load_image(data))


def is_fast(data: bytes, processor: SaisaImageProcessor) -> bool:
    """Returns whether a file is a plain JPEG that is resized without special care for its size or filter."""
    size = plain_jpeg_size(data)
    if size is None or processor.resample not in FILTERS:
        return False
    height, width = (max(size), max(size)) if processor.image_aspect_ratio == "pad" else size
    resized_height, resized_width = processor.resized_size(width, height)
    return max(height * width, resized_height * resized_width) <= MAX_INTERMEDIATE_PIXELS


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Returns height and width in pixels of a JPEG without surprises, or None for any other file.

    Pillow's header tells: it holds one picture of 8 bits, gray or YCbCr, which ends. So left to Pillow are CMYK, what
    Adobe's marker says is RGB, MPO (several pictures), files that are cut short, and heights told after the scan.
    """
    try:
        image = JpegImageFile(io.BytesIO(data))
    except (SyntaxError, OSError, ValueError):
        return None
    is_whole = data.rfind(END_OF_IMAGE, image.fp.tell() if image.fp else 0) >= 0  # a scan writes ff as ff 00
    has_one_frame = len(image.layer) == image.layers
    is_ycbcr = image.mode in ("L", "RGB") and ("adobe" not in image.info or image.info.get("adobe_transform") == 1)
    is_plain = is_whole and has_one_frame and is_ycbcr and "mp" not in image.info
    return (image.height, image.width) if is_plain else None


def _decode_jpeg(data: bytes) -> Tensor | None:
    """Returns the pixels of a plain JPEG as they are stored, uint8[H, W, 3], or None if it is damaged.

    Then Pillow judges it, which knows the same kinds of damage. The header has told of cut files already because
    torchvision 0.26 loses the memory of a picture on which it fails (pytorch/vision issue 9383).
    """
    from torchvision.io import ImageReadMode, decode_jpeg  # which only who reads images needs

    writable = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # torch warns of bytes, which are not
    try:
        return cast(Tensor, decode_jpeg(writable, mode=ImageReadMode.RGB)).permute(1, 2, 0)
    except RuntimeError:
        return None


def _fit(image_HW3: Tensor, processor: SaisaImageProcessor) -> Tensor:
    """Returns an image resized, padded and cropped in the processor's geometry, uint8[3, H, W]."""
    mode = FILTERS[processor.resample]
    height, width, _ = image_HW3.shape
    if processor.image_aspect_ratio == "pad":
        side, colour = max(height, width), processor.padding_colour
        new_height, new_width = processor.resized_size(side, side)
        if height < width:  # Width is resized before height, so the rows of padding need not be there yet.
            image_HW3 = _pad(_resize(image_HW3, height, new_width, mode), 0, side, colour)
        elif height > width:
            image_HW3 = _pad(image_HW3, 1, side, colour)
    else:
        new_height, new_width = processor.resized_size(width, height)
    image_HW3 = _resize(image_HW3, new_height, new_width, mode)
    crop_height, crop_width = processor.output_size
    top, left = (new_height - crop_height) // 2, (new_width - crop_width) // 2
    return image_HW3[top : top + crop_height, left : left + crop_width].permute(2, 0, 1)


def _resize(image_HW3: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Returns an image resized in Pillow's order, which decides what is rounded and clipped in between.

    Width comes before height; since Pillow 13 (pull request 9549) height comes first where it shrinks, and by more than
    twice as many pixels as width. Source: trials with 3,000 sizes; older versions of Pillow differ from 13 there.
    """
    old_height, old_width, _ = image_HW3.shape
    sizes = [(height, width)]
    if old_height - height > max(0, 2 * (old_width - width)):
        sizes = [(height, old_width), *sizes]
    batch_B3HW = image_HW3[None].permute(0, 3, 1, 2)  # colours innermost in memory, and torch must see that they are
    for size in sizes:
        batch_B3HW = interpolate(batch_B3HW, size, mode=mode, antialias=True)
    return batch_B3HW[0].permute(1, 2, 0)


def _pad(image_HW3: Tensor, axis: int, side: int, colour: tuple[int, ...]) -> Tensor:
    """Returns an image between two bands of one colour, `side` pixels high (axis 0) or wide (axis 1)."""
    num_missing = side - image_HW3.shape[axis]
    num_before, num_after = num_missing // 2, num_missing - num_missing // 2
    height, width = (num_after, image_HW3.shape[1]) if axis == 0 else (image_HW3.shape[0], num_after)
    band_HW3 = torch.frombuffer(bytearray(colour) * (height * width), dtype=torch.uint8).view(height, width, 3)
    return torch.cat([band_HW3.narrow(axis, 0, num_before), image_HW3, band_HW3], axis)
