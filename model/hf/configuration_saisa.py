"""The configuration of a SAISA checkpoint in Hugging Face format.

The language model's fields are flat and carry Llama's names. The vision encoder's own configuration is nested:

    {"model_type": "saisa", "hidden_size": 4096, ..., "vision_select_layer": -2, "projector_type": "mlp",
     "image_token_id": 32000, "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, ...}}
"""

from typing import Any

from transformers import CLIPVisionConfig, PretrainedConfig, SiglipVisionConfig

from .family_saisa import ARCHITECTURES, CROSS_ATTENTIONS, LayerKind, layer_kinds

PROJECTOR_TYPES = ("mlp", "linear", "resampler")
OLDEST_TRANSFORMERS = "4.57.0"


class TimmVisionConfig(PretrainedConfig):
    """An encoder of the library timm, see `timm_saisa`.

    Args:
        architecture: timm's name of it.
        hidden_size: width of the features that projectors read.
        num_hidden_layers: its stages or blocks.
        image_size: pixels, square.
        patch_size: pixels that a place of its grid of features stands for.
    """

    model_type = "timm_grid"

    def __init__(
        self,
        architecture: str = "convnext_xxlarge",
        hidden_size: int = 3072,
        num_hidden_layers: int = 4,
        image_size: int = 1024,
        patch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        self.architecture = architecture
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.image_size = image_size
        self.patch_size = patch_size
        super().__init__(**kwargs)


VISION_CONFIGS = {
    "clip_vision_model": CLIPVisionConfig,
    "siglip_vision_model": SiglipVisionConfig,
    "timm_grid": TimmVisionConfig,
}


class SaisaConfig(PretrainedConfig):
    """A Llama-shaped language model, a frozen encoder of images, and a projector in every layer.

    Args:
        rope_theta: base of the rotary frequencies; there is no rope scaling.
        attention_bias: the query, key and value projections have a bias (Qwen2).
        vision_config: the encoder's configuration; its `model_type` says CLIP, SigLIP or timm.
        vision_select_layer: index of the encoder's hidden state that the projectors read; -2 is the penultimate.
        projector_type: "mlp" (Linear, GELU, Linear), "linear" or "resampler" (table 7 of the paper).
        resampler_tokens: visual tokens that a resampler makes of an image; by default 256, and 64 of "open_flamingo".
        architecture: what layers do with visual tokens, see `family_saisa`: "saisa", or one that it is compared with.
        block_size: layers that share one projector and visual input ("saisa").
        frozen_layers: layers that leave visual tokens unchanged ("shortv").
        cross_attention: what blocks are made of, "open_flamingo" or "llama_3_2" ("flamingo").
        cross_attention_every: layers for each block ("flamingo").
        vocab_size: ids that the model knows; in an export `image_token_id` is one of them.
        num_image_rows: how many of them an export added to the language model's, for the image token.
        image_token_id: the id that stands for one visual token in `input_ids`. Its embedding is never used.
        eos_token_id: an id or a list of ids.

    Raises:
        ValueError: the encoder or projector type is unknown, or the selected layer does not exist.
    """

    model_type = "saisa"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 4096,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        attention_bias: bool = False,
        tie_word_embeddings: bool = False,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        vision_select_layer: int = -2,
        projector_type: str = "mlp",
        resampler_tokens: int | None = None,
        architecture: str = "saisa",
        block_size: int = 1,
        frozen_layers: list[int] | tuple[int, ...] = (),
        cross_attention: str | None = None,
        cross_attention_every: int | None = None,
        image_token_id: int = 32000,
        num_image_rows: int = 0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = 1,
        eos_token_id: Any = 2,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.attention_bias = attention_bias
        self.vision_config = _vision_config(vision_config)
        self.vision_select_layer = vision_select_layer
        self.projector_type = projector_type
        self.resampler_tokens = resampler_tokens or (64 if cross_attention == "open_flamingo" else 256)
        self.architecture = architecture
        self.block_size = block_size
        self.frozen_layers = list(frozen_layers)
        self.cross_attention = cross_attention
        self.cross_attention_every = cross_attention_every
        self.num_image_rows = num_image_rows
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        if projector_type not in PROJECTOR_TYPES:
            raise ValueError(f"projector_type={projector_type!r} must be one of {', '.join(PROJECTOR_TYPES)}")
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture={architecture!r} must be one of {', '.join(ARCHITECTURES)}")
        every = cross_attention_every
        is_some = cross_attention in CROSS_ATTENTIONS and isinstance(every, int) and 0 < every <= num_hidden_layers
        if architecture == "flamingo" and not is_some:
            raise ValueError(
                f"cross_attention={cross_attention!r} must be one of {', '.join(CROSS_ATTENTIONS)}, and "
                f"cross_attention_every={every!r} a number from 1 to {num_hidden_layers}"
            )
        num_layers = self.vision_config.num_hidden_layers
        if not -num_layers - 1 <= vision_select_layer <= num_layers:
            raise ValueError(
                f"vision_select_layer={vision_select_layer} must be one of the {num_layers + 1} hidden states of the "
                "vision encoder; use -2 for the penultimate"
            )
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        # Set last: transformers 5 checks ids as a configuration is made, and warns of one outside the vocabulary.
        self.image_token_id = image_token_id

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, with the oldest transformers that reads them as `transformers_version`.

        Beside a configuration of its own version, 4.57.3 to 4.57.6 take every tokenizer of more than 100,000 tokens
        for Mistral's, warn of its "incorrect regex pattern", and advise what would break it.
        """
        return super().to_dict() | {"transformers_version": OLDEST_TRANSFORMERS}

    def validate(self) -> None:
        """Passes: transformers 5 checks again on saving, and `image_token_id` is outside the vocabulary on purpose."""

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """What each layer does with visual tokens."""
        architecture: Any = self.architecture
        return layer_kinds(
            architecture,
            self.num_hidden_layers,
            tuple(self.frozen_layers),
            self.block_size,
            self.cross_attention_every,
        )

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens of one image: a resampler's, or the patches of the encoder's grid (without a class token)."""
        if self.projector_type == "resampler" or self.cross_attention == "open_flamingo":
            return self.resampler_tokens
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2


def _vision_config(given: PretrainedConfig | dict[str, Any] | None) -> Any:
    if given is None:
        return CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                                image_size=336, patch_size=14)  # fmt: skip
    if isinstance(given, PretrainedConfig):
        return given
    kind = given.get("model_type")
    if kind not in VISION_CONFIGS:
        raise ValueError(f"vision_config.model_type={kind!r} must be one of {', '.join(VISION_CONFIGS)}")
    return VISION_CONFIGS[kind].from_dict(given)
