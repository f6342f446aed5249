"""A checkpoint leaves in Hugging Face format, and says the same there."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from common.console import describe
from pipeline.checkpoint.checkpoint import restore_checkpoint
from pipeline.checkpoint.run_info import find_checkpoint
from pipeline.distributed import initialize_distributed, shutdown_distributed
from pipeline.evaluation.evaluate import evaluate
from pipeline.export import export
from pipeline.state import build
from tests.full_disk import no_file_larger_than


@pytest.fixture(scope="module")
def exported(stage2, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model"
    export(find_checkpoint(stage2.run_dir), out)
    return out


def test_logits_equal_the_training_models(stage2, exported):
    hf = AutoModelForImageTextToText.from_pretrained(exported, trust_remote_code=True)
    state = build(stage2, initialize_distributed())
    restore_checkpoint(find_checkpoint(stage2.run_dir), state.run, state.stages, state.optimizer, state.groups)
    (model,) = state.stages
    num_tokens, image_token = stage2.model.vision.num_tokens, hf.config.image_token_id
    for micro_batch in state.source[0].micro_batches:
        pack = micro_batch.pack
        pixels = state.source.image_processor.normalize(micro_batch.pixels_B3HW)
        with torch.no_grad():
            features = state.tower(pixels) if len(pixels) else torch.zeros(0, num_tokens, 32)
            ours = model.logits(model.hidden_states(pack, features.flatten(0, 1)))[:, : stage2.model.vocab_size]
        text = image = 0
        for length, count in zip(pack.text_lengths, pack.image_counts, strict=True):
            rows, images = slice(text, text + length), slice(image, image + count)
            text, image = rows.stop, images.stop
            slots = pack.positions_T[rows]
            input_ids = torch.full((1, length + count * num_tokens), image_token)
            input_ids[0, slots] = pack.token_ids_T[rows]
            with torch.no_grad():
                theirs = hf(input_ids=input_ids, pixel_values=pixels[images] if count else None).logits[0, slots]
            assert image_token == stage2.model.vocab_size and torch.all(theirs[:, image_token] == -1e4)
            # fp32 rounding of sums in another order through two layers; worst seen 4e-6 of logits of order 5
            torch.testing.assert_close(theirs[:, :image_token], ours[rows], rtol=1e-4, atol=5e-5)
    shutdown_distributed()


def test_the_encoder_and_what_was_not_trained_come_from_the_base(stage1, tmp_path):
    export(find_checkpoint(stage1.run_dir), tmp_path / "out")
    hf = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True).state_dict()
    first, second = (hf[f"model.layers.{i}.mm_projector.0.weight"] for i in (0, 1))
    assert torch.equal(first, second), "stage 1's one projector in every layer"
    base, out = (
        json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        for folder in (stage1.init.base, tmp_path / "out")
    )
    assert set(base) < set(out)


def test_the_exported_folder_answers_questions(world, exported):
    result = evaluate(exported, world.root / "data/test.json", world.root / "data/images", max_new_tokens=4)
    assert result.num_questions > 8
    assert AutoProcessor.from_pretrained(exported, trust_remote_code=True).image_processor.image_aspect_ratio == "pad"


def test_an_existing_folder_is_not_overwritten(stage2, exported):
    with pytest.raises(ValueError, match="exists and is not empty"):
        export(find_checkpoint(stage2.run_dir), exported)


def test_an_export_that_finds_no_room_is_one_line_and_leaves_nothing(stage2, tmp_path):
    with no_file_larger_than(20_000), pytest.raises(OSError) as error:
        export(find_checkpoint(stage2.run_dir), tmp_path / "out")
    assert f"{tmp_path}/out.part/shard-0.safetensors: File too large; no file may" in describe(error.value)
    assert not list(tmp_path.iterdir())
