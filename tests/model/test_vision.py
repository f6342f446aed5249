"""Encoding shared out over processes: everyone gets all features, nobody does another's work."""

import pytest
import torch

from model.pack import rows_of_pack
from model.vision import encode_together
from pipeline.distributed import initialize_distributed, shutdown_distributed
from tests.processes import run_together


def features_of(pixels: torch.Tensor) -> torch.Tensor:
    """Two visual tokens an image, which tell which image it was."""
    value = pixels.flatten(1)[:, 0].float()
    return torch.stack([value, value + 0.5], dim=1)[..., None].expand(-1, -1, 3)


def encode_share(num_images: int, window: int) -> list[int]:
    initialize_distributed()
    group = torch.distributed.group.WORLD
    assert group is not None
    seen: list[int] = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        seen.extend(pixels.flatten(1)[:, 0].tolist())
        return features_of(pixels)

    images = torch.arange(1, num_images + 1, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    found = encode_together(encode, images[group.rank() :: group.size()], num_images, window, group)
    assert torch.equal(found, features_of(images))
    shutdown_distributed()
    return seen


@pytest.mark.parametrize(("num_processes", "num_images", "window"), [(1, 5, 2), (2, 7, 2), (3, 7, 64), (3, 2, 1)])
def test_every_image_is_encoded_once_and_known_to_all(num_processes, num_images, window):
    answers = run_together(num_processes, encode_share, num_images, window)
    worked = sorted(image for seen in answers for image in seen if image)
    assert worked == list(range(1, num_images + 1))
    assert max(len(seen) for seen in answers) == -(-num_images // num_processes)


def test_padding_repeats_a_row_so_that_no_number_is_larger():
    features = torch.tensor([[[1.0], [5.0]], [[-9.0], [2.0]]])
    assert rows_of_pack(features, 3).flatten().tolist() == [1, 5, -9, 2, 2, 2, 2]
    assert rows_of_pack(features[:0], 2).flatten().tolist() == [0, 0]
    assert rows_of_pack(features, 0).shape == (4, 1)
