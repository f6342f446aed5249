"""Where each text token finds its keys, as ranges of rows, and the variable-length sequences these make.

Keys stand in one row a pack: all visual tokens, then all text (`model.pack`). A text token sees the visual tokens of
the images before it and the text up to itself, both of its own sample: two ranges of rows. All tokens between two
images see the same images, so they form a **segment**: its queries and its whole prefix of keys, the segment's own
text last, are one sequence under a bottom-right causal mask. One varlen call over all segments is then exact, and no
mask is built. The price: keys before an image are needed again by the text after it, so they are gathered twice.

The pack `a <image> b c | d e`, whose image has 4 visual tokens, has S = 9 keys, v v v v a b c d e:

    segment   queries   keys                  mask, bottom-right causal
    1         a         a                     1
    2         b c       v v v v a b c         1 1 1 1 1 1 0
                                              1 1 1 1 1 1 1
    3         d e       d e                   1 0
                                              1 1

    cu_seqlens_q   0 1 3 5
    cu_seqlens_k   0 1 8 10
    key_indices    4 | 0 1 2 3 4 5 6 | 7 8

Dims: T text tokens, I visual tokens, S = I + T keys, E keys of all segments, P of them copies that
are not a row's last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

# A sample and a position in one number. Positions, those of padding too, are below 2**32.
SAMPLE_STRIDE = 1 << 32


@dataclass(frozen=True)
class KeyRanges:
    """The keys of every text token: visual rows [visual_start, visual_end) and text rows from text_start to itself.

    Attributes:
        visual_start_T: int64[T] first visual row of the token's sample.
        visual_end_T: int64[T] the row behind the last image that stands before the token.
        text_start_T: int64[T] first text row of the token's sample; text rows count from 0, not from I.
        num_visual: I, with padding.
    """

    visual_start_T: np.ndarray
    visual_end_T: np.ndarray
    text_start_T: np.ndarray
    num_visual: int

    @property
    def num_keys(self) -> int:
        """S."""
        return self.num_visual + len(self.text_start_T)


@dataclass(frozen=True)
class Segments:
    """Sequences for a varlen kernel with a bottom-right causal mask; query rows are the pack's text rows, in order.

    Attributes:
        cu_seqlens_q: int32[num_segments + 1] where each segment's queries start among the T text rows.
        cu_seqlens_k: int32[num_segments + 1] where each segment's keys start among the E gathered ones.
        key_indices: int64[E] the row, of S, of every gathered key.
        last_copies: int64[S] the place, of E, of every row's last copy; 0 for a row that no segment has.
        repeats: int64[P] the places of all other copies, and
        repeated_rows: int64[P] the rows that they are copies of.
        unseen_rows: int64[U] the rows that no segment has: padding, and images with no text behind them.
        max_seqlen_q: queries of the largest segment.
        max_seqlen_k: keys of the largest segment.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_indices: Tensor
    last_copies: Tensor
    repeats: Tensor
    repeated_rows: Tensor
    unseen_rows: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    TENSORS: ClassVar = (
        "cu_seqlens_q",
        "cu_seqlens_k",
        "key_indices",
        "last_copies",
        "repeats",
        "repeated_rows",
        "unseen_rows",
    )


def key_ranges(
    positions_T: np.ndarray,
    image_positions: np.ndarray,
    text_lengths: Sequence[int],
    image_counts: Sequence[int],
    num_tokens_per_image: int,
    num_visual_padding: int,
) -> KeyRanges:
    """Returns which keys each text token sees; the arguments are those of a `Pack`."""
    lengths, counts = np.asarray(text_lengths, dtype=np.int64), np.asarray(image_counts, dtype=np.int64)
    sample_of_text = np.repeat(np.arange(len(lengths)), lengths)
    sample_of_image = np.repeat(np.arange(len(counts)), counts)
    sort_keys = sample_of_image * SAMPLE_STRIDE + image_positions
    assert (np.diff(sort_keys) > 0).all(), "the images of a sample stand in order"
    # Of all images of the pack in order, how many stand before each token: whole samples, then images of its own.
    images_before_T = np.searchsorted(sort_keys, sample_of_text * SAMPLE_STRIDE + positions_T)
    first_image, first_text = np.cumsum(counts) - counts, np.cumsum(lengths) - lengths
    return KeyRanges(
        visual_start_T=first_image[sample_of_text] * num_tokens_per_image,
        visual_end_T=images_before_T * num_tokens_per_image,
        text_start_T=first_text[sample_of_text],
        num_visual=int(counts.sum()) * num_tokens_per_image + num_visual_padding,
    )


def split_at_images(ranges: KeyRanges) -> Segments:
    """Returns the segments of a pack, on the CPU. A segment without text, before or between images, does not exist."""
    num_text = len(ranges.text_start_T)
    begins = np.ones(num_text, dtype=bool)
    begins[1:] = (np.diff(ranges.visual_end_T) != 0) | (np.diff(ranges.text_start_T) != 0)
    starts = np.flatnonzero(begins)
    ends = np.append(starts[1:], num_text)
    visual_starts, visual_ends = ranges.visual_start_T[starts], ranges.visual_end_T[starts]
    text_starts = ranges.text_start_T[starts]
    return segments_of(
        num_queries=ends - starts,
        firsts=np.stack([visual_starts, text_starts + ranges.num_visual], axis=1),
        counts=np.stack([visual_ends - visual_starts, ends - text_starts], axis=1),
        num_rows=ranges.num_keys,
    )


def segments_of(num_queries: np.ndarray, firsts: np.ndarray, counts: np.ndarray, num_rows: int) -> Segments:
    """Returns segments by their queries and the runs of rows that are their keys, on the CPU.

    Args:
        num_queries: int64[segments].
        firsts: int64[segments, runs] the first row of each run.
        counts: int64[segments, runs] how many rows.
        num_rows: of which these are some.
    """
    num_keys = counts.sum(axis=1)
    firsts, counts = firsts.ravel(), counts.ravel()
    offsets = np.cumsum(counts) - counts
    key_indices = np.arange(counts.sum()) + np.repeat(firsts - offsets, counts)
    last_copies = np.full(num_rows, -1)
    last_copies[key_indices] = np.arange(len(key_indices))  # in order: the last one stays
    repeats = np.flatnonzero(last_copies[key_indices] != np.arange(len(key_indices)))
    return Segments(
        cu_seqlens_q=_cumulative(num_queries),
        cu_seqlens_k=_cumulative(num_keys),
        key_indices=torch.from_numpy(key_indices),
        last_copies=torch.from_numpy(last_copies.clip(min=0)),
        repeats=torch.from_numpy(repeats),
        repeated_rows=torch.from_numpy(key_indices[repeats]),
        unseen_rows=torch.from_numpy(np.flatnonzero(last_copies < 0)),
        max_seqlen_q=int(num_queries.max(initial=0)),
        max_seqlen_k=int(num_keys.max(initial=0)),
    )


def _cumulative(lengths: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
