"""SAISA for inference and fine-tuning, as a model of transformers 4.57 and 5; `layers_saisa` is what is new about it.

`input_ids` hold one `image_token_id` per visual token. The model encodes the images, runs the layers on the text tokens
alone, and puts the logits back where they belong, with zeros in the slots of visual tokens.

Dims: B samples, S slots (visual and text), T text rows (the most that a sample has), M keys (cached and new; all slots
of a static cache), N images, D hidden, Q query heads, V vocabulary.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_saisa import SaisaConfig
from .flamingo_saisa import Images, Perceiver, Seen, build_front
from .generation_saisa import SaisaGenerationMixin
from .layers_saisa import SaisaRMSNorm, Slots, View, rotary_table
from .projectors_saisa import Resampler
from .timm_saisa import build_tower
from .updates_saisa import build_layer
from .vision_saisa import STORED_NAMES, FrozenLinear, stored_name

IGNORE_INDEX = -100
KERNELS = ("sdpa", "eager", "sdpa_without_vmap")  # the last is how transformers says "sdpa" when it exports a graph
# The logit of the image token, which nobody can say: far below all others, and finite, because logits processors
# subtract and multiply logits, and label smoothing takes their mean.
UNSAYABLE = -1e4


class SaisaModel(nn.Module):
    """Embedding, vision encoder, layers and final norm."""

    def __init__(self, config: SaisaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mm_projector = build_front(config)
        self.layers = nn.ModuleList([build_layer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = SaisaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vision_tower = build_tower(config.vision_config, config.vision_select_layer)

    def find_visual(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Returns bool[B, S], true at image placeholders: by their id or, without ids, by their id's embedding.

        Raises:
            ValueError: there is nothing to look at.
        """
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        if inputs_embeds is None:
            raise ValueError("forward needs input_ids or inputs_embeds")
        if self.config.image_token_id >= self.config.vocab_size:
            raise ValueError("this model has no embedding of the image token; pass input_ids beside inputs_embeds")
        image_id = torch.tensor([self.config.image_token_id], device=inputs_embeds.device)
        return (inputs_embeds == self.embed_tokens(image_id).to(inputs_embeds.device)).all(dim=-1)

    def forward(
        self,
        visual_BS: Tensor,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        pixels: Tensor | None,
        cache: Any,
        cache_position: Tensor | None,
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Returns the final hidden states [B, S, D], the inputs of all layers, and all attention weights, if wanted.

        At visual slots hidden states are zero, and so are the weights [B, Q, S, M] with which they would ask.
        """
        slot_S, mask_BM = find_keys(visual_BS, attention_mask, cache, cache_position)
        if position_ids is None:
            position_ids = (mask_BM.long().cumsum(dim=1) - 1).clamp(min=0)[:, slot_S]
        self._check_placeholders(visual_BS, pixels)
        features_NPC = None if pixels is None else self.vision_tower(pixels)
        visual, images = features_NPC, None
        if self.config.architecture == "flamingo":
            images = Images.of(cache, len(visual_BS), visual_BS.device)
            if features_NPC is not None:
                assert self.mm_projector is not None
                visual = images.add(visual_BS, slot_S, self.mm_projector(features_NPC), self.config.num_image_tokens)
            mask_BM, position_ids = images.without(mask_BM, position_ids, slot_S)
        slots = Slots.find(visual_BS, 0 if pixels is None else len(pixels) * self.config.num_image_tokens)

        if inputs_embeds is not None:
            t_BTD = slots.gather(inputs_embeds)
        else:
            assert input_ids is not None
            t_BTD = self.embed_tokens(slots.gather(input_ids.masked_fill(visual_BS, 0)))
        key_M = torch.arange(mask_BM.shape[1], device=visual_BS.device)
        query_BS1 = slot_S.expand_as(visual_BS)[..., None]
        mask_B1TM = mask_of(slots.gather(query_BS1), key_M, mask_BM)
        asks = any(kind.update == "full" for kind in self.config.layer_kinds)
        mask_B1SM = mask_of(query_BS1, key_M, mask_BM) if asks else None
        rotary_BS2H = rotary_table(position_ids, self.config.head_dim, self.config.rope_theta, t_BTD.dtype)
        has_weights = output_attentions or self.config._attn_implementation == "eager"
        view = View(rotary_BS2H, mask_B1TM, slot_S, has_weights, mask_B1SM)
        if images is not None and images.slot_BK.shape[1]:
            slot_BT = slots.gather(slot_S.expand_as(visual_BS))
            view = view._replace(seen=Seen(images, slot_BT, self.config, is_kept=cache is not None))
        elif features_NPC is not None and self.mm_projector is not None:
            visual = slots.place(self.mm_projector(features_NPC))
        hidden_states, attentions = [], []
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer while the model drafts for itself
            if output_hidden_states:
                hidden_states.append(slots.merge(t_BTD.to(visual_BS.device), 0.0))
            visual = visual if layer.mm_projector is None else features_NPC
            t_BTD, visual, weights_BQTM = layer(t_BTD, visual, slots, view, past_key_values=cache)
            if output_attentions:
                weights_BTW = weights_BQTM.to(visual_BS.device).transpose(1, 2).flatten(2)
                attentions.append(slots.merge(weights_BTW, 0.0).unflatten(2, (-1, len(key_M))).transpose(1, 2))
        return slots.merge(self.norm(t_BTD).to(visual_BS.device), 0.0), hidden_states, attentions

    def _check_placeholders(self, visual_BS: Tensor, pixels_N3HW: Tensor | None) -> None:
        """Makes sure that the images fill the placeholders.

        Raises:
            ValueError: they do not.
        """
        if torch.compiler.is_compiling():
            return  # a graph cannot look
        per_image = self.config.num_image_tokens
        if pixels_N3HW is None:
            if visual_BS.shape[1] > 1 and bool(visual_BS.any()):  # a decoding step must not wait
                raise ValueError(f"there are {int(visual_BS.sum())} image placeholders but there are no pixel_values")
        elif len(pixels_N3HW) * per_image != (num_placeholders := int(visual_BS.sum())):
            raise ValueError(
                f"{len(pixels_N3HW)} images need {len(pixels_N3HW) * per_image} placeholders in input_ids ({per_image} "
                f"each), but there are {num_placeholders}; write one <image> in the text for every image"
            )


def mask_of(query_BR1: Tensor, key_M: Tensor, mask_BM: Tensor) -> Tensor:
    """Returns bool[B, 1, R, M]: a query sees the real keys up to its slot; itself always, so that it stays finite."""
    return ((key_M < query_BR1) & mask_BM[:, None] | (key_M == query_BR1))[:, None]


def find_keys(
    visual_BS: Tensor, attention_mask: Tensor | None, cache: Any, cache_position: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the cache's slots of the new keys, int64[S], and which keys are not padding, bool[B, M].

    Raises:
        ValueError: the mask covers something else than the cached and the new slots.
    """
    num_samples, num_new = visual_BS.shape
    num_cached = cache.get_seq_length() if cache is not None else 0
    slot_S = num_cached + torch.arange(num_new, device=visual_BS.device) if cache_position is None else cache_position
    static = cache if cache is not None and cache.is_compileable else None
    num_keys = num_cached + num_new if static is None else static.layers[0].max_cache_len
    if attention_mask is None:
        return slot_S, torch.ones(num_samples, num_keys, dtype=torch.bool, device=visual_BS.device)
    if static is not None and attention_mask.shape[1] != num_keys and attention_mask.shape[1] == num_cached + num_new:
        attention_mask = pad(attention_mask, (0, num_keys - attention_mask.shape[1]))  # nobody looks so far
    if attention_mask.shape != (num_samples, num_keys):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; it must cover the {int(num_cached)} cached and "
            f"{num_new} new positions of {num_samples} samples"
        )
    return slot_S, attention_mask.bool()


class SaisaForConditionalGeneration(SaisaGenerationMixin, PreTrainedModel, GenerationMixin):
    """A SAISA model that reads text and images and writes text.

    The vision tower is frozen: it runs without gradients, and tools that adapt layers pass it over.
    """

    config: SaisaConfig
    config_class = SaisaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules: ClassVar = [
        "SaisaLayer",
        "UpdatingLayer",
        "FlamingoLayer",
        "Perceiver",
        "VisionTower",
        "TimmTower",
    ]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # `num_items_in_batch`
    # transformers 5 wants target and source; 4.57 reads the targets, which are a dictionary's keys.
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SaisaConfig) -> None:
        super().__init__(config)
        self.model = SaisaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any) -> Any:
        """Returns the model of a folder; weights of the vision tower are found by their stored names."""
        return super().from_pretrained(
            *args, key_mapping=STORED_NAMES if key_mapping is None else key_mapping, **kwargs
        )

    def save_pretrained(self, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
        """Writes a folder with the stored names; where weights are kept elsewhere, the tower's are the loaded ones."""
        if state_dict is None and not any(parameter.is_meta for parameter in self.parameters()):
            state_dict = self.state_dict()
        if state_dict is not None:
            state_dict = {stored_name(name): tensor for name, tensor in state_dict.items()}
        return super().save_pretrained(*args, state_dict=state_dict, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Starts a new model with normal weights and zero biases; norms start at 1."""
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d | FrozenLinear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                nn.init.zeros_(bias)
        elif isinstance(module, Resampler | Perceiver):
            nn.init.normal_(module.latents)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the token embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """Returns the language model head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces the language model head."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        cache_position: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Returns logits, and a loss when there are labels.

        Args:
            input_ids: int64[B, S], `num_image_tokens` times `image_token_id` for every image.
            attention_mask: [B, cached + S], 0 at padding, which may stand on either side. With a static cache it may
                also cover all slots.
            position_ids: int64[B, S]; counted from the attention mask when absent.
            pixel_values: [N, 3, H, W], the images of all samples in order of appearance.
            past_key_values: a cache, dynamic or static.
            inputs_embeds: [B, S, D], in the place of `input_ids`; then placeholders are known by having exactly the
                embedding of `image_token_id`. If both are given, `input_ids` say where the placeholders are.
            labels: int64[B, S], -100 where there is no target. A visual token is no target, nor is what follows one:
                no text position predicts it.
            output_attentions: return the weights [B, Q, S, M] of every layer. Their last axis are the keys, a slot
                each: the cached ones and then the new ones, visual and text (all slots of a static cache). Rows of
                visual slots are zero: these ask nothing.
            output_hidden_states: return [B, S, D], the input of every layer and then the final, normed state; zero at
                visual slots, which the residual stream does not hold.
            logits_to_keep: the last so many positions (0: all), or the indices of positions, to compute logits for.
            num_items_in_batch: divides the summed loss; the number of targets when absent.
            cache_position: int64[S], slots of the new positions; where the cache ends when absent.
            kwargs: nothing; what would be ignored is refused.

        Returns:
            `logits` [B, kept, V], zero at visual positions, and `UNSAYABLE` for the image token everywhere;
            `past_key_values` with visual keys held once.

        Raises:
            ValueError: images and placeholders do not match, or shapes do not fit.
            TypeError: an argument is unknown.
        """
        if unknown := sorted(name for name, value in kwargs.items() if value is not None):
            raise TypeError(f"SaisaForConditionalGeneration.forward does not know {', '.join(unknown)}")
        config = self.config
        if config._attn_implementation not in KERNELS:
            raise ValueError(f"attn_implementation={config._attn_implementation!r} must be 'sdpa' or 'eager'")
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        cache = self._cache_of_step(past_key_values, use_cache, has_labels=labels is not None)
        visual_BS = self.model.find_visual(input_ids, inputs_embeds)
        hidden_BSD, hidden_states, attentions = self.model(
            visual_BS, input_ids, inputs_embeds, attention_mask, position_ids, pixel_values, cache, cache_position,
            bool(output_attentions), bool(output_hidden_states),
        )  # fmt: skip

        # The head has no bias, so zero hidden states give zero logits.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits: Tensor = self.lm_head(hidden_BSD[:, kept])
        if config.image_token_id < logits.shape[-1]:
            logits[..., config.image_token_id] = UNSAYABLE
        output = CausalLMOutputWithPast(
            loss=None if labels is None else self._loss(logits, labels, visual_BS, num_items_in_batch),  # pyright: ignore
            logits=logits,  # pyright: ignore
            past_key_values=cache,
            hidden_states=(*hidden_states, hidden_BSD) if output_hidden_states else None,  # pyright: ignore
            attentions=tuple(attentions) if output_attentions else None,  # pyright: ignore
        )
        return output.to_tuple() if return_dict is False else output

    def _cache_of_step(self, given: Any, use_cache: bool | None, has_labels: bool) -> Any:
        """Returns the cache that a step fills: the given one, a new one, or none.

        Raises:
            ValueError: a cache is given where layers run twice.
        """
        runs_twice = self.training and self.model.layers[0].gradient_checkpointing
        if runs_twice and given is not None:
            raise ValueError("gradient checkpointing runs layers twice, which would fill a cache twice; pass none")
        if use_cache is None:
            use_cache = self.config.use_cache and not has_labels
        return DynamicCache() if use_cache and given is None and not runs_twice else given

    def _loss(self, logits_BSV: Tensor, labels_BS: Tensor, visual_BS: Tensor, num_items: int | Tensor | None) -> Tensor:
        if logits_BSV.shape[:2] != labels_BS.shape:
            raise ValueError("labels need the logits of every position; leave logits_to_keep unset")
        targets = labels_BS[:, 1:].masked_fill(visual_BS[:, :-1] | visual_BS[:, 1:], IGNORE_INDEX)
        total = cross_entropy(logits_BSV[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum")
        return total / ((targets != IGNORE_INDEX).sum().clamp(min=1) if num_items is None else num_items)
