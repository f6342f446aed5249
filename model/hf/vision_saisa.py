"""The frozen CLIP or SigLIP encoder, up to the hidden state that SAISA reads.

Written out here because the module nesting of transformers' own encoders changed between 4.x and 5.x, and a checkpoint
must not: stored weights have the names of `CLIPVisionModel` and `SiglipVisionModel` in transformers 4.57. Weights past
the selected hidden state (the last layers, the final norm, SigLIP's pooling head) are held, so that a folder survives
loading and saving, but never run.

Tools that adapt or quantise a model pick layers by type (every `nn.Linear`) or by how names end (`q_proj`). This
encoder is meant to stay as it is, so its layers are `FrozenLinear`s and, once loaded, its attention's projections are
called `query`, `key` and `value`. In files they keep their names: `STORED_NAMES` and `stored_name` translate.

Dims: N images, H x W pixels, P patches, K = P (+ 1 with a class token) positions, C vision width, h heads.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.activations import ACT2FN

PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
# From names in files (a pattern, as `from_pretrained(key_mapping=)` takes it) to names in a loaded model.
STORED_NAMES = {
    rf"(vision_tower\.vision_model\.encoder\.layers\.\d+\.self_attn)\.{stored}\.": rf"\1.{loaded}."
    for stored, loaded in PROJECTIONS.items()
}


def stored_name(name: str) -> str:
    """Returns the name under which files hold a weight of a loaded model."""
    for stored, loaded in PROJECTIONS.items():
        name = name.replace(f".self_attn.{loaded}.", f".self_attn.{stored}.")
    return name


class FrozenLinear(nn.Module):
    """A linear layer that is not an `nn.Linear`, so that nothing that looks for those changes it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., out_features]."""
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Returns what PEFT shows when told to adapt this layer by name."""
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, of the frozen vision tower: exclude_modules=r'.*vision_tower.*'"


class Embeddings(nn.Module):
    """Patches to vectors, with learned positions; CLIP puts a class token in front."""

    def __init__(self, config: Any, is_clip: bool) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        num_positions = (config.image_size // patch) ** 2 + int(is_clip)
        self.class_embedding = nn.Parameter(torch.zeros(width)) if is_clip else None
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=not is_clip)
        self.position_embedding = nn.Embedding(num_positions, width)

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        """Returns [N, K, C]."""
        x_NPC = self.patch_embedding(pixels_N3HW).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            x_NPC = torch.cat([self.class_embedding.expand(x_NPC.shape[0], 1, -1), x_NPC], dim=1)
        # Called, not read: what keeps weights elsewhere (accelerate) brings them when their module is called.
        return x_NPC + self.position_embedding(torch.arange(x_NPC.shape[1], device=x_NPC.device))


class Attention(nn.Module):
    """Full self-attention."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query, self.key = FrozenLinear(width, width), FrozenLinear(width, width)
        self.value, self.out_proj = FrozenLinear(width, width), FrozenLinear(width, width)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes stored names too: `load_state_dict` knows no `key_mapping`."""
        for stored, loaded in PROJECTIONS.items():
            for kind in ("weight", "bias"):
                if (name := f"{prefix}{stored}.{kind}") in state_dict:
                    state_dict[f"{prefix}{loaded}.{kind}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x_NKC: Tensor) -> Tensor:
        """Returns [N, K, C]."""
        projections = (self.query, self.key, self.value)
        heads = [f(x_NKC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in projections]
        return self.out_proj(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = FrozenLinear(config.hidden_size, config.intermediate_size)
        self.fc2 = FrozenLinear(config.intermediate_size, config.hidden_size)

    def forward(self, x_NKC: Tensor) -> Tensor:
        """Returns [N, K, C]."""
        return self.fc2(self.activation(self.fc1(x_NKC)))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_NKC: Tensor) -> Tensor:
        """Returns [N, K, C]."""
        x_NKC = x_NKC + self.self_attn(self.layer_norm1(x_NKC))
        return x_NKC + self.mlp(self.layer_norm2(x_NKC))


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, x_NKC: Tensor, num_layers: int) -> Tensor:
        """Returns [N, K, C] as the first `num_layers` leave it."""
        for layer in self.layers[:num_layers]:
            x_NKC = layer(x_NKC)
        return x_NKC


class PoolingAttention(nn.Module):
    """The weights of an `nn.MultiheadAttention`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = FrozenLinear(width, width)


class PoolingHead(nn.Module):
    """The weights of SigLIP's attention pooling. SAISA reads patches, so it never runs."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.attention = PoolingAttention(config.hidden_size)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)


class VisionTransformer(nn.Module):
    """Embeddings, layers, and what follows them. (`pre_layrnorm` is CLIP's own spelling.)"""

    def __init__(self, config: Any, is_clip: bool) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, is_clip)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if is_clip else nn.Identity()
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if not is_clip and getattr(config, "vision_use_head", True):
            self.head = PoolingHead(config)


class VisionTower(nn.Module):
    """Pixels to the features Z that every layer's projector reads. Frozen."""

    def __init__(self, config: Any, select_layer: int) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.is_clip = config.model_type == "clip_vision_model"
        # Hidden state j of n layers is what j layers leave, so negative j counts back from n + 1.
        self.num_layers = select_layer if select_layer >= 0 else config.num_hidden_layers + 1 + select_layer
        self.vision_model = VisionTransformer(config, self.is_clip)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        """Returns the features [N, P, C] of normalised pixels, without the class token.

        Raises:
            ValueError: the images do not have the size the encoder was trained on.
        """
        if tuple(pixels_N3HW.shape[1:]) != (3, self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values has shape {list(pixels_N3HW.shape)}; the vision encoder takes [num_images, 3, "
                f"{self.image_size}, {self.image_size}]; use the checkpoint's own processor"
            )
        vision = self.vision_model
        weight = vision.embeddings.patch_embedding.weight
        # A weight that is kept elsewhere has the device "meta"; then whoever keeps it moves the pixels as well.
        device = pixels_N3HW.device if weight.device.type == "meta" else weight.device
        x_NKC = vision.pre_layrnorm(vision.embeddings(pixels_N3HW.to(device, weight.dtype)))
        x_NKC = vision.encoder(x_NKC, self.num_layers)
        return x_NKC[:, 1:] if self.is_clip else x_NKC
