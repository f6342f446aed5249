r"""Text and images to model inputs, token for token as in training.

A text is cut at `<image>`, its pieces are tokenised on their own, and `num_image_tokens` placeholders stand between
them, so a tokenizer that opens a text with a space does so after each image. This is how LLaVA tokenises; leaving
`<image>` to the tokenizer as one of its added tokens gives other ids.

    "<image>\nWhat?"  ->  <s> [image] * 576 _ \n What ?
"""

import io
import urllib.request
from typing import Any, ClassVar

from PIL import Image
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin

from .image_processing_saisa import SaisaImageProcessor

IMAGE_TOKEN = "<image>"


class SaisaProcessor(ProcessorMixin):
    """A tokenizer and an image processor.

    Args:
        num_image_tokens: visual tokens of an image.
        chat_template: Jinja template for `apply_chat_template`, the words that training used.
    """

    image_processor: Any
    tokenizer: Any
    chat_template: Any
    attributes: ClassVar = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 576,
        chat_template: str | None = None,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def _get_arguments_from_pretrained(cls, folder: Any, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
        """Returns the parts of a saved processor; both are known here, so no automatic class has to find them."""
        return [SaisaImageProcessor.from_pretrained(folder, **kwargs), AutoTokenizer.from_pretrained(folder, **kwargs)]

    def __call__(
        self,
        *,
        text: str | list[str],
        images: Any = None,
        padding: bool | str = False,
        padding_side: str = "left",
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Returns `input_ids` and `attention_mask` [B, S], and `pixel_values` [N, 3, H, W] if there are images.

        Args:
            text: one text or several, with `<image>` where an image stands.
            images: an image, a list for all texts in order, or a list for each text. An image is a PIL image, an
                array, a path, or a URL.
            padding: True or "longest", or "max_length".
            padding_side: "left", which `generate` needs, or "right".
            add_special_tokens: let the tokenizer add its BOS.

        Raises:
            ValueError: `<image>` and images do not match in number.
            TypeError: an option that this processor would have to ignore.
        """
        if ignored := sorted(name for name, value in kwargs.items() if value is not None and value is not False):
            raise TypeError(f"SaisaProcessor does not know the option {', '.join(ignored)}")
        texts = [text] if isinstance(text, str) else list(text)
        flat = self._match_images(texts, images)
        ids = [self.tokenize(one, add_special_tokens) for one in texts]
        data: dict[str, Any] = self._pad(ids, padding, padding_side, max_length)
        if flat:
            pixels = self.image_processor([load_image(image) for image in flat], return_tensors=return_tensors)
            data["pixel_values"] = pixels["pixel_values"]
        return BatchFeature(data, tensor_type=return_tensors)

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of a text, with `num_image_tokens` placeholders for every `<image>`."""
        bos = list(self.tokenizer("").input_ids) if add_special_tokens else []
        pieces = [self.tokenizer(p, add_special_tokens=False, verbose=False).input_ids for p in text.split(IMAGE_TOKEN)]
        ids = bos + list(pieces[0])
        for piece in pieces[1:]:
            ids += [self.image_token_id] * self.num_image_tokens + list(piece)
        return ids

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns messages as text, or as model inputs with `tokenize=True, return_dict=True`.

        A message's content is a text, or a list of `{"type": "text", "text": ...}` and `{"type": "image", ...}`. With
        `tokenize=True` each image part holds its image under `image`, `path` or `url`.
        """
        return super().apply_chat_template(_with_parts(conversation), *args, **kwargs)

    def _match_images(self, texts: list[str], images: Any) -> list[Any]:
        """Returns the images of all texts in order, after counting them."""
        images = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
        wanted = [text.count(IMAGE_TOKEN) for text in texts]
        if images and all(isinstance(row, list | tuple) for row in images):
            given = [len(row) for row in images]
            if given != wanted:
                raise ValueError(f"the texts have {wanted} {IMAGE_TOKEN} each, but the lists of images have {given}")
            return [image for row in images for image in row]
        if len(images) != sum(wanted):
            raise ValueError(f"the text has {sum(wanted)} {IMAGE_TOKEN}, but there are {len(images)} images")
        return images

    def _pad(
        self, ids: list[list[int]], padding: bool | str, padding_side: str, max_length: int | None
    ) -> dict[str, list[list[int]]]:
        if padding not in (False, True, "do_not_pad", "longest", "max_length") or padding_side not in ("left", "right"):
            raise ValueError(
                f"padding={padding!r}, padding_side={padding_side!r}: use False, True, 'longest' or 'max_length', and "
                "'left' or 'right'"
            )
        masks = [[1] * len(row) for row in ids]
        if padding in (False, "do_not_pad"):
            return {"input_ids": ids, "attention_mask": masks}
        width = max(map(len, ids))
        if padding == "max_length":
            if max_length is None or max_length < width:
                raise ValueError(f"max_length={max_length} must be at least {width}, the longest text; nothing is cut")
            width = max_length
        token = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

        def fill(row: list[int], filler: int) -> list[int]:
            padding = [filler] * (width - len(row))
            return padding + row if padding_side == "left" else row + padding

        return {"input_ids": [fill(row, token) for row in ids], "attention_mask": [fill(row, 0) for row in masks]}


def load_image(image: Any) -> Any:
    """Returns an image opened from a path or a URL, anything else as it is.

    transformers' own loader turns images by their EXIF orientation, which training, like LLaVA, does not.
    """
    if not isinstance(image, str):
        return image
    if image.startswith(("http://", "https://")):
        with urllib.request.urlopen(image, timeout=60) as response:
            return Image.open(io.BytesIO(response.read()))
    return Image.open(image)


def _with_parts(conversation: Any) -> Any:
    """Returns a conversation, or several, with every content a list of parts (transformers 4.57 wants that)."""
    if isinstance(conversation, list | tuple):
        return [_with_parts(item) for item in conversation]
    if isinstance(conversation.get("content"), str):
        return conversation | {"content": [{"type": "text", "text": conversation["content"]}]}
    return conversation
