"""A pack: several samples in one row, the unit of work of the model (a micro-batch).

The residual stream holds text only, so a pack keeps text and images apart and says where both stood. Two samples, the
first `a <image> b c` with a 4-token image, the second `d e` (text only):

    text row           a  b  c  d  e
    positions_T        0  5  6  0  1       positions in each sample's full sequence
    text_lengths       3, 2                text tokens of each sample
    image_positions    1                   where each image starts: its tokens stand at 1, 2, 3, 4
    image_counts       1, 0                images of each sample

Dims: T text tokens, I visual tokens, S = I + T keys.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

IGNORE_INDEX = -100  # a text position whose next token is not a target


@dataclass(frozen=True)
class Pack:
    """Several samples in one row.

    Attributes:
        token_ids_T: int64[T] text tokens of all samples, one after the other.
        positions_T: int64[T] position of each in its sample's full sequence, visual tokens counted.
        targets_T: int64[T] the token each position is to predict, or `IGNORE_INDEX`.
        image_positions: int64[num_images] position of each image's first visual token.
        text_lengths: text tokens of each sample.
        image_counts: images of each sample.
        num_tokens_per_image: visual tokens of one image.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    image_positions: Tensor
    text_lengths: list[int]
    image_counts: list[int]
    num_tokens_per_image: int

    @cached_property
    def visual_positions_I(self) -> Tensor:
        """int64[I] position of each visual token in its sample's full sequence."""
        steps = torch.arange(self.num_tokens_per_image, device=self.image_positions.device)
        return (self.image_positions[:, None] + steps).flatten()

    @cached_property
    def key_positions_S(self) -> Tensor:
        """int64[S] positions of all keys in the model's order: first every visual token, then every text token."""
        return torch.cat([self.visual_positions_I, self.positions_T])

    @cached_property
    def visual_lengths(self) -> list[int]:
        """Visual tokens of each sample."""
        return [count * self.num_tokens_per_image for count in self.image_counts]

    @cached_property
    def num_targets(self) -> int:
        """Text positions that have a token to predict."""
        return int((self.targets_T != IGNORE_INDEX).sum())

    @cached_property
    def masks(self) -> list[Tensor]:
        """bool[t, s] for each sample: true where its text token t attends to its key s (visual first, then text).

        The first sample of the module's example, with columns image (4), a, b, c:

            a   0 0 0 0  1 0 0      stands before the image and does not see it
            b   1 1 1 1  1 1 0
            c   1 1 1 1  1 1 1
        """
        text = self.positions_T.split(self.text_lengths)
        visual = self.visual_positions_I.split(self.visual_lengths)
        return [t[:, None] >= torch.cat([v, t])[None, :] for t, v in zip(text, visual, strict=True)]

    def to(self, device: torch.device) -> "Pack":
        """Returns the pack with its tensors on `device`."""
        tensors = ("token_ids_T", "positions_T", "targets_T", "image_positions")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in tensors})


def empty_pack(num_tokens_per_image: int) -> Pack:
    """Returns a pack with one token and no target: work for a rank that has none, so that all ranks stay in step."""
    zero = torch.zeros(1, dtype=torch.long)
    return Pack(zero, zero, torch.full([1], IGNORE_INDEX), zero[:0], [1], [0], num_tokens_per_image)
