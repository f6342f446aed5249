"""From any image file to the pixels a CLIP or SigLIP encoder reads: one implementation, for training and for use.

    to_rgb           whatever Pillow opens   -> 8-bit RGB
    resize_to_uint8  an image                -> uint8[3, H, W], resized, padded or cropped; small enough to send around
    normalize        uint8[..., 3, H, W]     -> f32[..., 3, H, W], on the device the pixels are on

The values equal, bit for bit, those of transformers' CLIPImageProcessor and SiglipImageProcessor (the Pillow ones),
after LLaVA's padding to a square if `image_aspect_ratio` is "pad". This file is shipped inside exported checkpoints:
it may import numpy, Pillow, torch, transformers and its neighbours only.
"""

from math import isfinite
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageCms
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .image_loading_saisa import list_images, load_image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Above these an image is not blown up to its full intermediate size, which would take gigabytes for a thin line:
# a 65,500 x 1 image scaled to a shortest edge of 336 has 7 billion pixels.
MAX_INTERMEDIATE_PIXELS = 2**27

RESAMPLING = frozenset(map(int, Image.Resampling))
MAX_SIDE = 4096  # of the images that come out, in pixels: no encoder takes as many


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns an image as 8-bit RGB.

    Images without transparency equal `image.convert("RGB")`, which LLaVA uses, except where that is wrong:

    - Animations: the first frame.
    - Transparency (alpha channel, transparent palette entry or colour): laid over white. `convert` drops it and shows
      the colours underneath, often black or noise.
    - 16-bit grayscale ("I;16"): 0..65535 becomes 0..255 (divided by 257, rounded). `convert` clips it to white.
    - Integers and floats without a declared range ("I", "F"): the first of 0..1 (floats only), 0..255 (floats only)
      and 0..65535 that holds all values becomes 0..255, else the image's own minimum and maximum do.
    - LAB: to sRGB. `convert` refuses it.

    The EXIF orientation is ignored, as it is by LLaVA: pixels stay as stored.

    Raises:
        OSError: the file is truncated or broken.
    """
    if image.tell() != 0:
        image.seek(0)
    image.load()
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _gray_to_rgb(image)
    if image.has_transparency_data or image.mode in ("La", "RGBa"):
        straight = image.convert("LA") if image.mode == "La" else image
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, straight.convert("RGBA")).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return cast(Image.Image, ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB")))
    return image.convert("RGB")


def _gray_to_rgb(image: Image.Image) -> Image.Image:
    """Returns a grayscale image of more than 8 bits as RGB."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low, high = 0.0, 65535.0
    if not image.mode.startswith("I;16"):
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
        smallest, largest = float(values.min()), float(values.max())
        fitting = [top for top in ranges if smallest >= 0 and largest <= top]
        low, high = (0.0, fitting[0]) if fitting else (smallest, largest)
    gray = np.rint((values - low) * (255.0 / max(high - low, 1e-30))).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return Image.fromarray(gray).convert("RGB")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)


class SaisaImageProcessor(BaseImageProcessor):
    """Resizes, crops and normalises images as the vision encoder was trained.

    Args:
        size: {"shortest_edge": n} keeps the aspect ratio (CLIP); {"height": h, "width": w} does not (SigLIP).
        crop_size: {"height": h, "width": w} cut from the centre (CLIP); None for no crop (SigLIP).
        image_mean: mean of red, green and blue, 0..1.
        image_std: their standard deviations.
        resample: Pillow's number of the resampling filter; 3 is bicubic.
        image_aspect_ratio: "square" goes straight to `size`; "pad" first pads to a square with the mean colour.

    Raises:
        ValueError: the sizes do not give images of one fixed size, or a setting is unknown.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        size: dict[str, int] | None = None,
        crop_size: dict[str, int] | None = None,
        image_mean: tuple[float, ...] | list[float] = CLIP_MEAN,
        image_std: tuple[float, ...] | list[float] = CLIP_STD,
        resample: int = 3,
        image_aspect_ratio: str = "square",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if size is None:
            size, crop_size = {"shortest_edge": 336}, {"height": 336, "width": 336}
        self.size = {key: int(value) for key, value in size.items() if value is not None}
        self.crop_size = None if crop_size is None else {key: int(crop_size[key]) for key in ("height", "width")}
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.resample = int(resample)
        self.image_aspect_ratio = image_aspect_ratio
        self._check()

    def _check(self) -> None:
        if self.image_aspect_ratio not in ("square", "pad"):
            raise ValueError(f"image_aspect_ratio={self.image_aspect_ratio!r} must be one of 'square', 'pad'")
        if set(self.size) not in ({"shortest_edge"}, {"height", "width"}):
            raise ValueError(f"size={self.size} must have the keys shortest_edge, or height and width")
        if "shortest_edge" in self.size and self.crop_size is None:
            raise ValueError(f"size={self.size} gives images of many shapes; set crop_size")
        if self.crop_size and not all(self.crop_size[key] <= self._least(key) for key in ("height", "width")):
            raise ValueError(f"crop_size={self.crop_size} must not exceed size={self.size}")

        if not all(0 < side <= MAX_SIDE for side in (*self.size.values(), *(self.crop_size or {}).values())):
            raise ValueError(f"size={self.size} and crop_size={self.crop_size} must be of 1 to {MAX_SIDE} pixels")
        if self.resample not in RESAMPLING:
            raise ValueError(f"resample={self.resample} must be one of {', '.join(map(str, sorted(RESAMPLING)))}")
        for name, least, most in (("image_mean", 0, 1), ("image_std", 1e-3, 1e3)):
            values = getattr(self, name)
            if len(values) != 3 or not all(_is_number(value) and least <= value <= most for value in values):
                raise ValueError(f"{name}={str(values)[:60]} must be three numbers of {least} to {most}")

    def _least(self, key: str) -> int:
        return self.size.get("shortest_edge") or self.size[key]

    @classmethod
    def from_encoder(cls, settings: dict[str, Any], image_aspect_ratio: str = "square") -> "SaisaImageProcessor":
        """Returns the processor that a vision encoder's preprocessor_config.json describes.

        Args:
            settings: that of a CLIP or SigLIP encoder, old or new style.
            image_aspect_ratio: "square" or "pad".

        Raises:
            ValueError: the settings skip a step that this processor always does.
        """
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if settings.get(step, True) is False:
                raise ValueError(f"{step}=false is not supported: these encoders want every image {step[3:]}d")
        if abs(settings.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise ValueError(f"rescale_factor={settings['rescale_factor']} is not supported; CLIP and SigLIP use 1/255")
        size, crop = settings["size"], settings.get("crop_size")
        if settings.get("do_center_crop", crop is not None) is False:
            crop = None
        return cls(
            size={"shortest_edge": size} if isinstance(size, int) else size,
            crop_size={"height": crop, "width": crop} if isinstance(crop, int) else crop,
            image_mean=settings.get("image_mean") or CLIP_MEAN,
            image_std=settings.get("image_std") or CLIP_STD,
            resample=settings.get("resample", 3),
            image_aspect_ratio=image_aspect_ratio,
        )

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of every image that comes out, in pixels."""
        last = self.crop_size or self.size
        return last["height"], last["width"]

    @property
    def padding_colour(self) -> tuple[int, ...]:
        """Red, green and blue of what "pad" adds, 0..255: the mean colour. Source: LLaVA, `process_images`."""
        return tuple(int(value * 255) for value in self.image_mean)

    def preprocess(
        self, images: Any, return_tensors: str | None = None, input_data_format: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Returns `pixel_values` f32[N, 3, H, W].

        Args:
            images: an image in any form that `image_loading_saisa` knows, a batch [N, ...], or a list of these.
            return_tensors: "pt" or "np"; without, a list of arrays.
            input_data_format: "channels_first" or "channels_last" for arrays whose shape does not tell.
            **kwargs: none; an option would have to be ignored.
        """
        if ignored := sorted(name for name, value in kwargs.items() if value is not None):
            raise TypeError(f"SaisaImageProcessor does not know the option {', '.join(ignored)}")
        loaded = (load_image(image, input_data_format) for image in list_images(images))
        pixels = [self.normalize(self.resize_to_uint8(image)).numpy() for image in loaded]
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def resize_to_uint8(self, image: Image.Image) -> torch.Tensor:
        """Returns the pixels of an image as uint8[3, H, W], resized and padded or cropped, not yet normalised."""
        rgb = to_rgb(image)
        if self.image_aspect_ratio == "pad":
            rgb = self._pad_to_square(rgb)
        height, width = self.resized_size(*rgb.size)
        crop_height, crop_width = self.output_size
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        if height * width <= MAX_INTERMEDIATE_PIXELS:
            rgb = rgb.resize((width, height), self.resample)
            rgb = rgb.crop((left, top, left + crop_width, top + crop_height))
        else:  # The same cut, made before resizing; rounding between its two passes may differ a little.
            x, y = rgb.width / width, rgb.height / height
            box = left * x, top * y, (left + crop_width) * x, (top + crop_height) * y
            rgb = rgb.resize((crop_width, crop_height), self.resample, box=box)
        return torch.from_numpy(np.array(rgb).transpose(2, 0, 1).copy())

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Returns (pixels / 255 - mean) / std as f32[..., 3, H, W], for uint8[..., 3, H, W] on any device."""
        # Divisors are tensors on the device: CUDA turns a division by a Python number into a less exact product.
        constants = torch.tensor([[255.0] * 3, self.image_mean, self.image_std])
        if images.is_cuda:  # or the copy would wait for the GPU
            constants = constants.pin_memory()
        scale, mean, std = constants.to(images.device, non_blocking=True)[:, :, None, None]
        return (images.float() / scale - mean) / std

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the height and width that an image of this size (once padded) is resized to, before the crop."""
        self._check()  # again: transformers sets the options of from_pretrained behind the constructor's back
        if "shortest_edge" not in self.size:
            return self.size["height"], self.size["width"]
        edge = self.size["shortest_edge"]
        longest = int(edge * max(width, height) / min(width, height))
        return (longest, edge) if width <= height else (edge, longest)

    def _pad_to_square(self, image: Image.Image) -> Image.Image:
        """Returns an image in the middle of a square of the mean colour. Source: LLaVA, `expand2square`."""
        side = max(image.size)
        if side * side > MAX_INTERMEDIATE_PIXELS:
            scale = MAX_INTERMEDIATE_PIXELS**0.5 / side
            image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))), self.resample)
            side = max(image.size)
        if image.width == image.height:
            return image
        square = Image.new("RGB", (side, side), self.padding_colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square
