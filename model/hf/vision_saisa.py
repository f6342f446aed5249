"""The frozen CLIP or SigLIP encoder, up to the hidden state that SAISA reads.

Written out here because the module nesting of transformers' own encoders changed between 4.x and 5.x, and a checkpoint
must not: the weight names are those of `CLIPVisionModel` and `SiglipVisionModel` in transformers 4.57. Weights past the
selected hidden state (the last layers, the final norm, SigLIP's pooling head) are held, so that a folder survives
loading and saving, but never run.

Dims: N images, H x W pixels, P patches, K = P (+ 1 with a class token) positions, C vision width, h heads.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.activations import ACT2FN


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
        return x_NPC + self.position_embedding.weight


class Attention(nn.Module):
    """Full self-attention."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x_NKC: Tensor) -> Tensor:
        """Returns [N, K, C]."""
        heads = [
            f(x_NKC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        ]
        return self.out_proj(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

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


class PoolingHead(nn.Module):
    """The weights of SigLIP's attention pooling. SAISA reads patches, so it never runs."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)
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
        x_NKC = vision.pre_layrnorm(vision.embeddings(pixels_N3HW.to(weight.device, weight.dtype)))
        x_NKC = vision.encoder(x_NKC, self.num_layers)
        return x_NKC[:, 1:] if self.is_clip else x_NKC
