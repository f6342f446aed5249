"""The sizes of a SAISA model: what the `model:` section of a run configuration holds.

`SaisaConfig` in `model/hf` is the same facts in Hugging Face terms; `model_config_from_hf` alone translates.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.hf.family_saisa import NUM_LATENTS, Architecture, CrossAttention, LayerKind, layer_kinds

ProjectorKind = Literal["mlp", "linear", "resampler"]
RESAMPLER_TOKENS = 256
Phase = Literal["pretrain", "finetune"]
"""Of training: stage 1 or stage 2 of the paper (a stage without more words is one of the pipeline)."""
FAMILY = ("architecture", "block_size", "frozen_layers", "cross_attention", "cross_attention_every")
"""Settings of a model that say what becomes of visual tokens."""
PROJECTOR = ("projector", "resampler_tokens")
"""Those that say what a projector is."""
FP8_ROWS = 32  # what every recipe takes in training; 16 would do for most
WEIGHT_RECIPES = ("tensorwise", "blockwise")  # whose weights can be kept in 8 bits alone
BLOCK_ROWS = 128  # what each process needs to send rows in 8 bits whose blocks have scales of their own


class Section(BaseModel):
    """Base of every configuration section: frozen; unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class VisionConfig(Section):
    """The frozen encoder. Its remaining sizes live in the base folder, beside its weights."""

    type: Literal["clip", "siglip", "timm"] = Field(default="clip", description="timm: the base folder says which")
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    image_size: int = Field(gt=0, description="pixels, square")
    patch_size: int = Field(gt=0, description="pixels, square")
    select_layer: int = Field(default=-2, description="hidden state that feeds the projectors; -2 is the penultimate")

    @property
    def num_tokens(self) -> int:
        """Features of an image (the class token is dropped), of which a projector makes visual tokens."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def usual_ffn_hidden_size(self) -> int:
        """The FFN of an encoder such as CLIP's, for costs on paper; a base folder has the real one.

        Raises:
            ValueError: It has none.
        """
        if self.type == "timm":
            raise ValueError("model.vision.type=timm: what it costs is counted in a base folder; use clip or siglip")
        return 4 * self.hidden_size

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not -self.num_layers - 1 <= self.select_layer <= self.num_layers:
            raise ValueError(
                f"model.vision.select_layer={self.select_layer} must be one of the {self.num_layers + 1} hidden "
                f"states of an encoder with model.vision.num_layers={self.num_layers}; use -2 for the penultimate"
            )
        return self


class ModelConfig(Section):
    """A Llama-shaped language model, and what its layers do with visual tokens."""

    architecture: Architecture = Field(default="saisa", description="what layers do with visual tokens")
    block_size: int = Field(default=1, gt=0, description="saisa: layers that share one projector and visual input")
    frozen_layers: tuple[int, ...] = Field(default=(), description="shortv: layers that leave visual tokens unchanged")
    cross_attention: CrossAttention | None = Field(default=None, description="flamingo: what its blocks are made of")
    cross_attention_every: int | None = Field(
        default=None, gt=0, description="flamingo: layers for each block; it stands before the last of them"
    )
    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_query_groups: int = Field(gt=0, description="key/value heads")
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    max_positions: int = Field(gt=0)
    norm_epsilon: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)
    qkv_bias: bool = False
    tie_embeddings: bool = False
    projector: ProjectorKind = Field(default="mlp", description="table 7 of the paper compares the three")
    resampler_tokens: int = Field(
        default_factory=lambda known: _usual_latents(known.get("cross_attention")),
        gt=0,
        description="resampler: visual tokens of an image; open_flamingo has one too, with 64",
    )
    pretrain_projectors: Literal["shared", "own"] = Field(
        default="shared", description="what stage 1 trains: one projector for all layers, or each layer's own (saisa)"
    )
    vision: VisionConfig

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        """What each layer does with visual tokens."""
        return layer_kinds(
            self.architecture, self.num_layers, self.frozen_layers, self.block_size, self.cross_attention_every
        )

    @property
    def num_tokens_per_image(self) -> int:
        """Visual tokens that an image is in a sequence; a projector may make fewer than the encoder has."""
        return self.resampler_tokens if self.is_resampled else self.vision.num_tokens

    @property
    def is_resampled(self) -> bool:
        """Whether the visual tokens of an image are learned latents."""
        return self.projector == "resampler" or self.cross_attention == "open_flamingo"

    @property
    def num_own_projectors(self) -> int:
        """Layers that have a projector in stage 2; where there is none, one in front of the first serves all."""
        return sum(kind.is_projected for kind in self.layers)

    def shares_projector(self, phase: Phase) -> bool:
        """Whether one projector outside the layers serves all: in stage 1 by default, and where none has one."""
        return (phase == "pretrain" and self.pretrain_projectors == "shared") or not self.num_own_projectors

    def trains_language_model(self, phase: Phase) -> bool:
        """Whether a phase trains all but the encoder; if not, what stands between that and the language model."""
        return phase == "finetune" and self.architecture != "flamingo"

    @model_validator(mode="after")
    def _check_cross_attention(self) -> Self:
        settings = {name: getattr(self, name) for name in ("cross_attention", "cross_attention_every")}
        for name, value in settings.items():
            if value is not None and self.architecture != "flamingo":
                raise ValueError(
                    f"model.{name}={value} is for model.architecture=flamingo; use that, or remove it: "
                    f"{self.architecture} has no blocks of cross-attention"
                )
            if value is None and self.architecture == "flamingo":
                raise ValueError(
                    f"model.architecture=flamingo needs model.{name}; use model.cross_attention=open_flamingo or "
                    "llama_3_2, and model.cross_attention_every=4 as they do"
                )
        if self.cross_attention_every is not None and self.cross_attention_every > self.num_layers:
            raise ValueError(
                f"model.cross_attention_every={self.cross_attention_every} must be at most "
                f"model.num_layers={self.num_layers}, or no layer has a block"
            )
        if self.cross_attention == "open_flamingo" and self.projector != "mlp":
            raise ValueError(
                f"model.projector={self.projector} with model.cross_attention=open_flamingo, whose resampler takes its "
                "place: remove it, or use model.cross_attention=llama_3_2"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.block_size != 1 and self.architecture != "saisa":
            raise ValueError(
                f"model.block_size={self.block_size} is for model.architecture=saisa, whose layers have projectors; "
                f"{self.architecture} has one, in front: remove it"
            )
        if self.resampler_tokens != RESAMPLER_TOKENS and not self.is_resampled:
            raise ValueError(
                f"model.resampler_tokens={self.resampler_tokens} is for model.projector=resampler; use that, or remove "
                f"it: with {self.projector} an image has as many tokens as the encoder gives, {self.vision.num_tokens}"
            )
        if self.pretrain_projectors == "own" and not self.num_own_projectors:
            raise ValueError(
                f"model.pretrain_projectors=own is for layers with projectors, and {self.architecture} has one, in "
                "front, which both stages train: remove it, or use model.architecture=saisa"
            )
        if self.block_size > self.num_layers:
            raise ValueError(f"model.block_size={self.block_size} must be at most model.num_layers={self.num_layers}")
        if self.frozen_layers and self.architecture != "shortv":
            raise ValueError(
                f"model.frozen_layers={list(self.frozen_layers)} is for model.architecture=shortv; use that, or remove "
                f"it: {self.architecture} says itself which layers update visual tokens"
            )
        if self.architecture == "shortv" and not self.frozen_layers:
            raise ValueError("model.architecture=shortv needs model.frozen_layers; without any it is llava")
        last = self.num_layers - 1
        if list(self.frozen_layers) != sorted({layer for layer in self.frozen_layers if 0 <= layer <= last}):
            raise ValueError(
                f"model.frozen_layers={list(self.frozen_layers)} must be numbers from 0 to {last}, each once and in "
                "order"
            )
        if self.num_attention_heads % self.num_query_groups:
            divisors = [n for n in range(1, self.num_attention_heads + 1) if self.num_attention_heads % n == 0]
            raise ValueError(
                f"model.num_query_groups={self.num_query_groups} must divide "
                f"model.num_attention_heads={self.num_attention_heads}; use one of {divisors}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} must be even: rotary embeddings turn pairs of features")
        return self


def _usual_latents(cross_attention: CrossAttention | None) -> int:
    return NUM_LATENTS if cross_attention == "open_flamingo" else RESAMPLER_TOKENS


class ComputeConfig(Section):
    """Precision, kernels and what memory is spent on."""

    precision: Literal["bf16", "fp32", "fp8"] = Field(
        default="bf16", description="of parameters and activations; fp8: bf16 whose layers multiply in 8 bits"
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = Field(
        default="tensorwise", description="how 8-bit numbers are scaled; mxfp8 needs Blackwell"
    )
    bf16_edge_layers: int = Field(default=0, ge=0, description="first and last layers that stay bf16 under fp8")
    fp8_weights: bool = Field(
        default=False,
        description="under fp8 in stage 2: layers hold their weights in 8 bits alone, not in bf16 besides",
    )
    attention: Literal["auto", "dense", "flash_attn", "torch_varlen", "block"] = "auto"
    recompute: Literal["none", "selective", "full"] = Field(
        default="none", description="selective: projectors and attention; full: layers keep their input only"
    )
    fused_kernels: bool = Field(
        default=True, description="Transformer Engine's rotary, activation and loss kernels, where it is used"
    )
    gradient_accumulation_fusion: bool = Field(default=False, description="weight gradients go into their buffer")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fp8_weights and (self.precision != "fp8" or self.fp8_recipe not in WEIGHT_RECIPES):
            raise ValueError(
                f"compute.fp8_weights=true with compute.precision={self.precision} and compute.fp8_recipe="
                f"{self.fp8_recipe}: it needs fp8 and a recipe whose scales follow from the weights alone; use "
                f"{' or '.join(WEIGHT_RECIPES)}, or compute.fp8_weights=false"
            )
        if self.bf16_edge_layers and self.precision == "fp8" and self.fp8_recipe == "delayed":
            raise ValueError(
                f"compute.bf16_edge_layers={self.bf16_edge_layers} needs layers that are scaled one by one, and "
                "compute.fp8_recipe=delayed updates the scales of all at once; use another recipe, or no edge layers"
            )
        if self.recompute != "none" and self.precision == "fp8" and self.fp8_recipe == "delayed":
            raise ValueError(
                f"compute.recompute={self.recompute} with compute.fp8_recipe=delayed would update the scales at every "
                "layer that is computed again; use another recipe, or compute.recompute=none"
            )
        return self

    def kernel_rows(self, are_divided: bool) -> int:
        """Returns what a linear layer's rows should be a multiple of; `are_divided`: by sequence parallelism."""
        if self.precision != "fp8":
            return 1
        return BLOCK_ROWS if are_divided and self.fp8_recipe == "blockwise" else FP8_ROWS


def model_config_from_hf(config: Any) -> ModelConfig:
    """Returns the `ModelConfig` that a Hugging Face `SaisaConfig` describes, less an export's row for the image."""
    vision = config.vision_config
    vision = vision if isinstance(vision, dict) else vision.to_dict()
    fields = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size - config.num_image_rows,
        "max_positions": config.max_position_embeddings,
        "norm_epsilon": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "qkv_bias": config.attention_bias,
        "tie_embeddings": config.tie_word_embeddings,
        "projector": config.projector_type,
        "resampler_tokens": config.resampler_tokens,
        "architecture": config.architecture,
        "block_size": config.block_size,
        "frozen_layers": tuple(config.frozen_layers),
        "cross_attention": config.cross_attention,
        "cross_attention_every": config.cross_attention_every,
        "vision": {
            "type": vision["model_type"].partition("_")[0],
            "hidden_size": vision["hidden_size"],
            "num_layers": vision["num_hidden_layers"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "select_layer": config.vision_select_layer,
        },
    }
    return ModelConfig.model_validate(fields, strict=True)  # what comes from a folder is a number or is refused


def differences(stated: ModelConfig, found: ModelConfig, has_projectors: bool) -> list[str]:
    """Returns one line for each setting in which the run's model and a folder's model differ.

    What becomes of visual tokens is for the run to say where the folder has no projectors, and where it has one in
    front and nothing else, among the architectures that have that.
    """
    is_free = not has_projectors or not any(m.num_own_projectors or m.cross_attention for m in (stated, found))
    free = {"vision", "pretrain_projectors", *(FAMILY if is_free else ()), *(() if has_projectors else PROJECTOR)}
    pairs = [("model", stated, found), ("model.vision", stated.vision, found.vision)]
    return [
        f"{path}.{name}={getattr(ours, name)!r} but the folder has {getattr(theirs, name)!r}"
        for path, ours, theirs in pairs
        for name in type(ours).model_fields
        if name not in free and getattr(ours, name) != getattr(theirs, name)
    ]
