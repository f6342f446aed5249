"""A pack: several samples in one row, the unit of work of the model (a micro-batch).

The residual stream holds text only, so a pack keeps text and images apart and says where both stood. Two samples, the
first `a <image> b c` with a 4-token image, the second `d e` (text only):

    text row           a  b  c  d  e
    positions_T        0  5  6  0  1       positions in each sample's full sequence
    text_lengths       3, 2                text tokens of each sample
    image_positions    1                   where each image starts: its tokens stand at 1, 2, 3, 4
    image_counts       1, 0                images of each sample

Dims: T text tokens, R those with a target, I visual tokens, S = I + T keys.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from model.block_attention import build_block_mask
from model.segments import KeyRanges, Segments, key_ranges, split_at_images
from model.transfer import copy_together

IGNORE_INDEX = -100  # a text position whose next token is not a target
TENSORS = ("token_ids_T", "positions_T", "targets_T", "image_positions")  # of a pack
BEHIND_ALL_TEXT = 1 << 20  # the position of padding among visual tokens: no text token stands there


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
        num_visual_padding: visual rows after all images that fill up what kernels want. They belong to the last
            sample, behind its text, where nothing sees them.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    image_positions: Tensor
    text_lengths: list[int]
    image_counts: list[int]
    num_tokens_per_image: int
    num_visual_padding: int = 0

    @cached_property
    def visual_positions_I(self) -> Tensor:
        """int64[I] position of each visual token in its sample's full sequence."""
        steps = torch.arange(self.num_tokens_per_image, device=self.image_positions.device)
        images = (self.image_positions[:, None] + steps).flatten()
        return torch.cat([images, images.new_full([self.num_visual_padding], BEHIND_ALL_TEXT)])

    @cached_property
    def key_positions_S(self) -> Tensor:
        """int64[S] positions of all keys in the model's order: first every visual token, then every text token."""
        return torch.cat([self.visual_positions_I, self.positions_T])

    @property
    def num_images(self) -> int:
        """Images of all samples."""
        return sum(self.image_counts)

    @cached_property
    def visual_lengths(self) -> list[int]:
        """Visual tokens of each sample; those of the last include the padding."""
        lengths = [count * self.num_tokens_per_image for count in self.image_counts]
        return [*lengths[:-1], lengths[-1] + self.num_visual_padding]

    @cached_property
    def target_rows_R(self) -> Tensor:
        """int64[R] the text positions that have a token to predict, in order."""
        return (self.targets_T != IGNORE_INDEX).nonzero()[:, 0]

    @property
    def num_targets(self) -> int:
        """Text positions that have a token to predict."""
        return len(self.target_rows_R)

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

    @cached_property
    def on_cpu(self) -> "Pack":
        """This pack in host memory: itself, or what `to` has copied it from."""
        if self.positions_T.device.type == "cpu":
            return self
        return replace(self, **{name: getattr(self, name).cpu() for name in TENSORS})

    @cached_property
    def key_ranges(self) -> KeyRanges:
        """Which rows of the keys each text token sees, on the CPU."""
        pack = self.on_cpu
        if pack is not self:
            return pack.key_ranges
        return key_ranges(
            pack.positions_T.numpy(),
            pack.image_positions.numpy(),
            pack.text_lengths,
            pack.image_counts,
            pack.num_tokens_per_image,
            pack.num_visual_padding,
        )

    @cached_property
    def in_order(self) -> "InOrder":
        """All rows of the pack in order of sample and position, on this pack's device."""
        if self.on_cpu is not self:
            return self.on_cpu.in_order.to(self.positions_T.device)
        steps = np.arange(self.num_tokens_per_image)
        visual = (self.image_positions.numpy()[:, None] + steps).ravel()
        padding = np.full(self.num_visual_padding, BEHIND_ALL_TEXT)
        positions_S = np.concatenate([visual, padding, self.positions_T.numpy()])
        samples = np.arange(len(self.text_lengths))
        sample_S = np.concatenate([samples.repeat(self.visual_lengths), samples.repeat(self.text_lengths)])
        rows_S = np.lexsort((positions_S, sample_S))
        nothing = torch.from_numpy(np.zeros(0, dtype=np.int64))
        pack = Pack(
            token_ids_T=nothing,
            positions_T=torch.from_numpy(positions_S[rows_S]),
            targets_T=nothing,
            image_positions=nothing,
            text_lengths=[t + v for t, v in zip(self.text_lengths, self.visual_lengths, strict=True)],
            image_counts=[0] * len(samples),
            num_tokens_per_image=self.num_tokens_per_image,
        )
        return InOrder(torch.from_numpy(rows_S), torch.from_numpy(rows_S.argsort()), pack)

    @cached_property
    def text_alone(self) -> "Pack":
        """The samples without their images, at the positions that their text has then, on this pack's device.

        It is for attention alone: it has no tokens and no targets.
        """
        if self.on_cpu is not self:
            return self.on_cpu.text_alone.to(self.positions_T.device)
        nothing = self.image_positions[:0]
        positions = [torch.arange(length) for length in self.text_lengths]
        return Pack(nothing, torch.cat(positions), nothing, nothing, self.text_lengths, [0] * len(positions), 1)

    @cached_property
    def segments(self) -> Segments:
        """The variable-length sequences of a flash kernel, on this pack's device."""
        if self.on_cpu is self:
            return split_at_images(self.key_ranges)
        return self.on_cpu.to(self.positions_T.device).segments

    @cached_property
    def block_mask(self) -> BlockMask:
        """The mask of a block-masked kernel, on this pack's device."""
        return build_block_mask(self.key_ranges, self.positions_T.device)

    def to(self, device: torch.device) -> "Pack":
        """Returns the pack with its tensors, and what is worked out from them, on `device`.

        It remembers this one: where something is worked out on the host, no kernel is waited for.
        """
        if device.type == "cpu":
            return self.on_cpu
        pack = self.on_cpu
        worked_out = {name: getattr(pack, name) for name in ("visual_positions_I", "key_positions_S", "target_rows_R")}
        segments = {name: getattr(pack.segments, name) for name in Segments.TENSORS}
        tensors = {name: getattr(pack, name) for name in TENSORS}
        moved = copy_together({**tensors, **worked_out, **segments}, device)
        there = replace(self, **{name: moved[name] for name in TENSORS})
        vars(there).update({name: moved[name] for name in worked_out}, on_cpu=pack)
        vars(there)["segments"] = replace(pack.segments, **{name: moved[name] for name in segments})
        return there


class InOrder(NamedTuple):
    """All rows of a pack, visual and text, in order of sample and position: for layers in which both ask.

    Fields:
        rows_S: int64[S] of each place in that order, the row among all visual rows and then all text rows.
        slots_S: int64[S] the other way round: of each such row, its place in the order.
        pack: The same samples as if every token were text, for `model.attention` alone: it has no tokens, no targets.
    """

    rows_S: Tensor
    slots_S: Tensor
    pack: Pack

    def to(self, device: torch.device) -> "InOrder":
        """Returns a copy of one that is in host memory, on `device`, where no kernel is waited for."""
        pack, names = self.pack, Segments.TENSORS
        moved = copy_together(
            {"rows": self.rows_S, "slots": self.slots_S, "positions": pack.positions_T}
            | {name: getattr(pack.segments, name) for name in names},
            device,
        )
        there = replace(pack, positions_T=moved["positions"], image_positions=moved["positions"][:0])
        segments = replace(pack.segments, **{name: moved[name] for name in names})
        vars(there).update(on_cpu=pack, segments=segments)
        return InOrder(moved["rows"], moved["slots"], there)


def rows_of_pack(features_NPC: Tensor, num_padding: int) -> Tensor:
    """Returns the visual rows [I, C] of a pack: those of its images, and padding that repeats one of them.

    A repeated row cannot widen the range of numbers that 8-bit scaling sees; a pack without images has zeros.
    """
    rows_IC = features_NPC.flatten(0, 1)
    last = rows_IC[-1:] if len(rows_IC) else rows_IC.new_zeros(1, rows_IC.shape[-1])
    return torch.cat([rows_IC, last.expand(num_padding, -1)])
