"""What cannot be traced is refused in one line that names the way out."""

import ctypes
import re

import pytest

from benchmarks.fake_gpu import runtime, te
from benchmarks.fake_gpu.__main__ import main
from benchmarks.fake_gpu.options import build_load
from benchmarks.fake_gpu.traces import Load
from pipeline.config import load_config
from tests.benchmarks.traced import STAGE2

SETTINGS = ["data.max_text_tokens_per_pack=2000", "data.max_positions=2000", "data.max_images_per_pack=8"]


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [(256, 1, 7), (200, 1, 8), (200, 3, 2), (10, 0, 200)],  # 2,000 text tokens; 8 images; 6 of 8 images; text alone
)
def test_packs_are_as_full_as_a_run_would_make_them(text, images, expected):
    config = load_config(STAGE2, SETTINGS)
    assert build_load(config, 2, None, text, images) == Load(2, expected, text, images)
    with pytest.raises(ValueError, match=f"--samples {expected + 1}: a pack of this run takes {expected} of {text}"):
        build_load(config, 2, expected + 1, text, images)


def test_samples_are_such_as_a_run_would_not_cut():
    with pytest.raises(ValueError, match="--text 900 and --images 2 make 2,052 positions"):
        build_load(load_config(STAGE2, SETTINGS), 1, None, 900, 2)


def test_interleaved_stages_take_as_many_packs_as_a_run_gives_them():
    config = load_config(STAGE2, [*SETTINGS, "parallel.pp=2", "parallel.chunks_per_rank=2"])
    assert build_load(config, 4, None, 256, 1).num_packs == 4
    with pytest.raises(ValueError, match="--packs 3: interleaved stages take a multiple of parallel.pp=2, .* use 4"):
        build_load(config, 3, None, 256, 1)


def test_the_process_is_one_of_the_world():
    with pytest.raises(ValueError, match="--rank 8 is none of --world 8; use 0 to 7"):
        main(STAGE2, world=8, rank=8)


def test_transformer_engine_is_of_the_version_that_the_stand_ins_are_for(tmp_path):
    te.check_version(te.FOLDER)
    (tmp_path / "transformer_engine-2.19.0.dist-info").mkdir()
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: no Python part of Transformer Engine 2.20.2")):
        te.check_version(tmp_path)


def test_a_function_that_another_torch_lacks_is_named():
    with pytest.raises(ValueError, match=r"of torch 2\S+ has no cudaNothing, which a fake GPU replaces; `make setup`"):
        runtime._overwrite(ctypes.CDLL(None), {"cudaNothing": runtime.SUCCESS})
