r"""Text and images to model inputs, token for token as in training.

A text is cut at `<image>`, its pieces are tokenised on their own, and `num_image_tokens` placeholders stand between
them, so a tokenizer that opens a text with a space does so after each image. This is how LLaVA tokenises; leaving
`<image>` to the tokenizer as one of its added tokens gives other ids.

    "<image>\nWhat?"  ->  <s> [image] * 576 _ \n What ?
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import AutoTokenizer, BatchFeature, ProcessorMixin

from .image_loading_saisa import list_images
from .image_processing_saisa import SaisaImageProcessor

IMAGE_TOKEN = "<image>"
# Where the image of a content part may stand; OpenAI's form has {"url": ...} under "image_url".
IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")


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
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        *,
        padding: bool | str = False,
        padding_side: str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        input_data_format: str | None = None,
        audios: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Returns `input_ids` and `attention_mask` [B, S], and `pixel_values` [N, 3, H, W] if there are images.

        Args:
            images: an image, a list for all texts in order, or a list for each text. An image is a file, a URL, base64
                text, a Pillow image, an array or a tensor: see `image_loading_saisa`.
            text: one text or several, with `<image>` where an image stands.
            videos: none; an empty list is none.
            audio: none; an empty list is none.
            padding: True or "longest", or "max_length".
            padding_side: "left", which `generate` needs, or "right"; None asks the tokenizer.
            max_length: positions to fill up to with padding="max_length".
            return_tensors: "pt" or "np"; without, lists.
            add_special_tokens: let the tokenizer add its BOS.
            input_data_format: "channels_first" or "channels_last" for arrays whose shape does not tell.
            audios: another name for `audio`.
            **kwargs: none; an option would have to be ignored.

        Raises:
            ValueError: `<image>` and images do not match in number, or there is a video or audio.
            TypeError: there is no text, or an option that this processor would have to ignore.
        """
        for name, value in (("videos", videos), ("audio", audio), ("audios", audios)):
            if not _is_empty(value):
                raise ValueError(f"{name} was given, but this model reads text and images only")
        if ignored := sorted(name for name, value in kwargs.items() if value is not None and value is not False):
            raise TypeError(f"SaisaProcessor does not know the option {', '.join(ignored)}")
        texts = [text] if isinstance(text, str) else list(text or [])
        if not texts or not all(isinstance(one, str) for one in texts):
            raise TypeError(f"text must be a text or a list of texts, with one {IMAGE_TOKEN} for every image")
        flat = self._match_images(texts, images)
        ids = [self.tokenize(one, add_special_tokens) for one in texts]
        data: dict[str, Any] = self._pad(ids, padding, padding_side or self.tokenizer.padding_side, max_length)
        if flat:
            pixels = self.image_processor(flat, return_tensors=return_tensors, input_data_format=input_data_format)
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

        A message's content is a text, or a list of `{"type": "text", "text": ...}`, `{"type": "image", ...}` and
        `{"type": "image_url", "image_url": {"url": ...}}`. With `tokenize=True` each image part holds its image under
        `image`, `url`, `path` or `base64`.

        Raises:
            ValueError: a part is of another type, or has none.
        """
        return super().apply_chat_template(_with_parts(conversation), *args, **kwargs)

    def _match_images(self, texts: list[str], images: Any) -> list[Any]:
        """Returns the images of all texts in order, after counting them."""
        wanted, flat = [text.count(IMAGE_TOKEN) for text in texts], list_images(images)
        if isinstance(images, list | tuple) and images and all(isinstance(row, list | tuple) for row in images):
            given = [len(list_images(row)) for row in images]
            if given != wanted:
                raise ValueError(f"the texts have {wanted} {IMAGE_TOKEN} each, but the lists of images have {given}")
        if len(flat) != sum(wanted):
            raise ValueError(f"the text has {sum(wanted)} {IMAGE_TOKEN}, but there are {len(flat)} images")
        return flat

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


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple) and all(_is_empty(item) for item in value))


def _with_parts(conversation: Any) -> Any:
    """Returns a conversation, or several, with every content a list of text and image parts."""
    if isinstance(conversation, list | tuple):
        return [_with_parts(item) for item in conversation]
    if not isinstance(conversation, Mapping) or not {"role", "content"} <= conversation.keys():
        raise ValueError(f"a message is {_shown(conversation)}; give {{'role': ..., 'content': ...}}")
    content = conversation["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list | tuple):
        raise ValueError(f"the content of a message is {_shown(parts)}; give a text or a list of parts")
    return dict(conversation) | {"content": [_read_part(part) for part in parts]}


def _read_part(part: Any) -> dict[str, Any]:
    """Returns `{"type": "text", "text": ...}`, or `{"type": "image"}` with the image (if it is there) as `image`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "image_url"):
        raise ValueError(f"a message has the part {_shown(part)}; this model reads parts of type text and image")
    for key in IMAGE_KEYS:
        image = part.get(key)
        image = image.get("url") if isinstance(image, Mapping) else image
        if image is None:
            continue
        if key == "base64" and not str(image).startswith("data:"):
            image = f"data:;base64,{image}"  # never the name of a file
        return {"type": "image", "image": image}
    return {"type": "image"}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
