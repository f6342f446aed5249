"""Packs of any layout, for tests: a sample is the text tokens before each of its images, and those after the last."""

from collections.abc import Sequence

import torch

from model.pack import IGNORE_INDEX, Pack

NUM_TOKENS_PER_IMAGE = 4
# zero, one, several, adjacent, leading and trailing images, text of one token, and no text at all
LAYOUTS = [(5,), (1, 4), (0, 3), (2, 3, 2), (0, 0, 3), (3, 0, 2, 1), (4, 0), (1, 1, 1, 1), (1,)]


def pack_of(
    layouts: Sequence[Sequence[int]],
    num_tokens_per_image: int = NUM_TOKENS_PER_IMAGE,
    num_text_padding: int = 0,
    num_visual_padding: int = 0,
) -> Pack:
    """Returns the samples in one pack, filled up as `pipeline.data.batches.build_pack` does."""
    positions, image_positions = [], []
    for segments in layouts:
        at = 0
        for number, length in enumerate(segments):
            positions += range(at, at + length)
            at += length
            if number < len(segments) - 1:
                image_positions.append(at)
                at += num_tokens_per_image
    is_padded = bool(num_text_padding or num_visual_padding)
    positions += range(num_text_padding)
    return Pack(
        torch.zeros(len(positions), dtype=torch.long),
        torch.tensor(positions, dtype=torch.long),
        torch.full([len(positions)], IGNORE_INDEX),
        torch.tensor(image_positions, dtype=torch.long),
        [sum(segments) for segments in layouts] + [num_text_padding] * is_padded,
        [len(segments) - 1 for segments in layouts] + [0] * is_padded,
        num_tokens_per_image,
        num_visual_padding,
    )


def random_layouts(seed: int, num_samples: int, max_images: int, max_text: int) -> list[tuple[int, ...]]:
    """Returns samples whose stretches of text are often empty or one token long."""
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> int:
        return int(torch.randint(limit + 1, (1,), generator=generator))

    def stretch() -> int:
        return (0, 1, draw(max_text))[draw(2)]

    return [(*(stretch() for _ in range(draw(max_images))), 1 + draw(max_text)) for _ in range(num_samples)]


# name: (samples, padding of text rows, padding of visual rows)
PACKS = {
    "all layouts": (LAYOUTS, 0, 0),
    "one sample": ([(2, 3)], 0, 0),
    "text only": ([(3,), (1,)], 0, 0),
    "text padding": (LAYOUTS, 5, 0),
    "both paddings": (LAYOUTS, 3, 7),
    "visual padding, no text with it": (LAYOUTS, 0, 6),
    "only padding": ([], 8, 8),
    **{f"random {seed}": (random_layouts(seed, 6, 4, 6), seed % 3, seed % 5) for seed in range(12)},
}
