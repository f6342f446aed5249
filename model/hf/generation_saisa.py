"""What `generate()` asks of a SAISA model: the inputs of each step, beams that keep their images, and drafted tokens.

Dims: B samples, S new slots, N images.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

NEEDS_TEXT_LAST = "a prompt ends in an image, and a visual token predicts nothing; add text after the image"
NEEDS_LEFT_PADDING = "a prompt ends in padding, and generation goes on from its end; use padding_side='left'"
# Told to `prepare_inputs_for_generation` by transformers 4.57 or 5; `forward` has no use for them.
HINTS = ("cache_position", "next_sequence_length", "is_first_iteration", "labels")


class SaisaGenerationMixin:
    """Methods that take the place of `GenerationMixin`'s, under transformers 4.57 and 5."""

    if TYPE_CHECKING:
        config: Any
        model: Any

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns the inputs of the next step: what the cache does not hold yet, with images where they are new.

        Raises:
            ValueError: a prompt ends in an image or in padding, or embeddings come without a cache.
        """
        inputs = {"attention_mask": attention_mask, "past_key_values": past_key_values, "logits_to_keep": 1}
        inputs |= {name: value for name, value in kwargs.items() if name not in HINTS}
        ids_or_embeds = input_ids if inputs_embeds is None else inputs_embeds
        num_total = ids_or_embeds.shape[1] if attention_mask is None else attention_mask.shape[1]
        num_cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        num_new = _num_new(num_cached, num_total, kwargs)

        # A caller who goes on from a cache may give the new ids alone: fewer than `num_new` are all there are.
        inputs["input_ids"] = input_ids[:, -num_new:].clone(memory_format=torch.contiguous_format)
        if inputs_embeds is not None:
            if num_total == inputs_embeds.shape[1]:  # the prompt; what follows it are ids
                ids = inputs["input_ids"] if input_ids.shape[1] else None
                inputs |= {"inputs_embeds": inputs_embeds[:, -num_new:], "input_ids": ids}
            elif past_key_values is None:
                raise ValueError("generating from inputs_embeds needs the cache; leave use_cache=True")
        # A decoding step is one generated token; looking at it would make the host wait for the GPU.
        if num_new > 1 or (isinstance(num_cached, int) and num_cached == 0):
            visual_BS = self.model.find_visual(inputs["input_ids"], inputs.get("inputs_embeds"))
            if bool(visual_BS[:, -1].any()):
                raise ValueError(NEEDS_TEXT_LAST)
            if attention_mask is not None and bool((attention_mask.any(dim=1) & ~attention_mask[:, -1].bool()).any()):
                raise ValueError(NEEDS_LEFT_PADDING)
            if bool(visual_BS.any()):
                inputs["pixel_values"] = self._new_images(pixel_values, input_ids, visual_BS)
        if position_ids is not None:
            inputs["position_ids"] = _last_positions(position_ids, num_total)[:, -num_new:]
        if getattr(past_key_values, "is_compileable", False):
            inputs |= _static_shapes(past_key_values, attention_mask, kwargs.get("cache_position"))
        return inputs

    def _new_images(self, pixel_values: Tensor | None, input_ids: Tensor, visual_BS: Tensor) -> Tensor | None:
        """Returns the images of the new placeholders, where those of the cached ones came along."""
        if pixel_values is None or visual_BS.shape == input_ids.shape:
            return pixel_values
        per_image = self.config.num_image_tokens
        num_all = ((input_ids == self.config.image_token_id).sum(dim=1) // per_image).tolist()
        num_new = (visual_BS.sum(dim=1) // per_image).tolist()
        if len(pixel_values) != sum(num_all):
            return pixel_values
        images = zip(pixel_values.split(num_all), num_new, strict=True)
        return torch.cat([own[len(own) - number :] for own, number in images])

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Returns every sample `expand_size` times in a row (beams), each with its own images in order."""
        pixels = kwargs.pop("pixel_values", None)
        if pixels is not None and expand_size > 1:
            has_ids = input_ids is not None and input_ids.shape[1] > 0
            visual_BS = self.model.find_visual(input_ids if has_ids else None, kwargs.get("inputs_embeds"))
            samples = pixels.split((visual_BS.sum(dim=1) // self.config.num_image_tokens).tolist())
            pixels = torch.cat([images for images in samples for _ in range(expand_size)])
        ids, kwargs = super()._expand_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return ids, kwargs | ({} if pixels is None else {"pixel_values": pixels})

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what drafts tokens (prompt lookup, an assistant), made to stop before an image placeholder.

        Prompt lookup repeats what it reads. A repeated placeholder would stand for no image.
        """
        generator: Any = super()._get_candidate_generator(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        draft = generator.get_candidates

        def get_candidates(input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            candidate_ids, logits = draft(input_ids, *args, **kwargs)
            is_image = candidate_ids[0, input_ids.shape[1] :] == self.config.image_token_id
            if bool(is_image.any()):
                num_kept = int(is_image.int().argmax())
                candidate_ids = candidate_ids[:, : input_ids.shape[1] + num_kept]
                logits = logits[:, :num_kept] if logits is not None and num_kept else None
            return candidate_ids, logits

        generator.get_candidates = get_candidates
        return generator


def _num_new(num_cached: Any, num_total: int, hints: dict[str, Any]) -> int:
    """Returns how many slots the cache does not hold yet; without asking the GPU, if transformers has told."""
    if (told := hints.get("next_sequence_length")) is not None:
        return int(told)
    positions = hints.get("cache_position")
    if isinstance(num_cached, Tensor) and positions is not None and len(positions):
        return len(positions)
    return max(num_total - int(num_cached), 1)


def _last_positions(position_ids: Tensor, num_total: int) -> Tensor:
    """Returns positions up to the last slot: transformers 4.57 does not go on counting those that a caller gave."""
    missing = torch.arange(1, num_total - position_ids.shape[1] + 1, device=position_ids.device)
    return torch.cat([position_ids, position_ids[:, -1:] + missing], dim=1)


def _static_shapes(cache: Any, attention_mask: Tensor | None, cache_position: Tensor | None) -> dict[str, Any]:
    """Returns inputs whose shapes are the same at every step, so that a compiled step is compiled once."""
    inputs: dict[str, Any] = {}
    if attention_mask is not None:
        num_missing = cache.layers[0].max_cache_len - attention_mask.shape[1]
        inputs["attention_mask"] = pad(attention_mask, (0, num_missing))
    if cache_position is not None and len(cache_position):
        inputs["cache_position"] = cache_position
    return inputs
