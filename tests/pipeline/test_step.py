"""What one step hands the model, and what it says it took."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel

from pipeline import loop
from pipeline.checkpoint.run_info import find_checkpoint
from pipeline.config import RunConfig
from pipeline.data.batches import BatchSource
from pipeline.data.lengths import LengthTable
from pipeline.distributed import initialize_distributed, shutdown_distributed
from pipeline.export_hf import export
from pipeline.loop import train
from pipeline.metrics import read_metrics
from pipeline.state import TrainState, build
from pipeline.step import model_inputs, train_step
from tests.processes import run_together
from tests.transformers_versions import CLIPImageProcessor, encoder_inside


def images_of_pack(state: TrainState, pack: list[int]) -> list[Path]:
    """The files that the images of a pack were made from."""
    (shards,) = state.source.samples.sets
    folder = Path(shards.location).parent
    return [folder / image["path"] for number in pack for image in shards.record(number)["images"]]


def test_the_model_gets_the_features_of_the_exported_processor_and_encoder(
    world, stage1, stage2, photo_shards, tmp_path
):
    """And those of CLIP itself, whose hidden state -2 without the class token they are."""
    export(find_checkpoint(stage2.run_dir), tmp_path / "export")
    processor = AutoProcessor.from_pretrained(tmp_path / "export", trust_remote_code=True)
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "export", trust_remote_code=True)
    clip = CLIPVisionModel.from_pretrained(world.root / "clip")
    changes = {"init__projector": stage1.run_dir, "data__shards": photo_shards, "data__exact_images": "true"}
    changes |= {"data__max_text_tokens_per_pack": 4096, "data__max_images_per_pack": 2}
    config = world.config("demo-stage2", tmp_path / "run", **changes)
    assert config.data.image_aspect_ratio == processor.image_processor.image_aspect_ratio == "pad"
    state = build(config, initialize_distributed())
    inputs = model_inputs(state, state.source[0])
    packs = state.source.schedule.plan(0).packs[0]
    assert [len(pack) for pack in packs] == [2, 2, 1]
    for pack, (_, features_IC) in zip(packs, inputs, strict=True):
        images = [Image.open(path) for path in images_of_pack(state, pack)]
        pixels = processor(text="<image>" * len(images), images=images, return_tensors="pt").pixel_values
        with torch.no_grad():
            theirs = exported.model.vision_tower(pixels).flatten(0, 1)
            clips = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(0, 1)
        # fp32 sums of batches of another size; features are of order one
        torch.testing.assert_close(features_IC, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features_IC, clips, rtol=1e-5, atol=1e-5)
    shutdown_distributed()


def test_square_pixels_are_clips_own(world, photo_shards, tmp_path):
    changes = {"data__shards": photo_shards, "data__exact_images": "true"}
    changes |= {"data__max_text_tokens_per_pack": 4096}
    state = build(world.config("demo-stage1", tmp_path, **changes), initialize_distributed())
    clip, processor = (kind.from_pretrained(world.root / "clip") for kind in (CLIPVisionModel, CLIPImageProcessor))
    ((_, features_IC),) = model_inputs(state, state.source[0])
    (pack,) = state.source.schedule.plan(0).packs[0]
    pixels = processor([Image.open(path) for path in images_of_pack(state, pack)], return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(0, 1)
    torch.testing.assert_close(features_IC, expected, rtol=1e-5, atol=1e-5)
    shutdown_distributed()


def test_flops_are_the_models_and_the_encoders(world, stage2):
    """The encoder's as torch counts them, once for every image."""
    clip = CLIPVisionModel.from_pretrained(world.root / "clip")
    encoder = encoder_inside(clip).encoder
    encoder.layers = encoder.layers[:-1]  # hidden state -2 needs no more
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        clip(torch.zeros(1, 3, 64, 64))
    for step in read_metrics(stage2.run_dir):
        encoder = step["flops"] - step["training_flops"]
        assert encoder == step["num_images"] * counter.get_total_flops() > 0
        assert step["tflops_per_second"] == pytest.approx(step["flops"] / step["step_seconds"] / 1e12)


def test_the_wait_for_data_is_a_part_of_the_step(stage2):
    state = build(stage2, initialize_distributed())
    metrics = train_step(state, state.source[0], wait_seconds=1000.0)
    assert 1000.0 < metrics.step_seconds < 1300.0
    assert metrics.data_wait_fraction == 1000.0 / metrics.step_seconds
    assert metrics.samples_per_second < 0.1
    shutdown_distributed()


def test_targets_that_the_length_table_did_not_tell_stop_the_run(stage2):
    """The loss would be divided by the one number, the gradients by the other."""
    state = build(stage2, initialize_distributed())
    batch = state.source[0]
    planned = replace(batch.counts, num_targets=batch.counts.num_targets + 1)
    with pytest.raises(ValueError, match=r"step 0: the samples have \d+ targets, but the length table says \d+"):
        train_step(state, replace(batch, counts=planned), 0.0)
    shutdown_distributed()


def with_another_table(config: RunConfig) -> str:
    """Returns what this process says of a length table that tells one target too many, and that no sample checks."""
    with pytest.MonkeyPatch.context() as patch:
        real = BatchSource.__init__

        def init(self, *args) -> None:
            real(self, *args)
            table = self.schedule.table
            table.column("num_targets")[self.schedule.samples(0)[0]] += 1

        patch.setattr(BatchSource, "__init__", init)
        patch.setattr(LengthTable, "check", lambda *_: None)
        with pytest.raises(ValueError, match="length table") as caught:
            train(config)
    shutdown_distributed()
    return str(caught.value)


def test_another_length_table_is_one_line_of_all_ranks(deep_stage2, tmp_path):
    real = read_metrics(deep_stage2.run_dir)[0]["num_targets"]
    said = run_together(2, with_another_table, deep_stage2.model_copy(update={"run_dir": tmp_path / "run"}))
    assert said[0] == said[1] and "\n" not in said[0]
    assert said[0].startswith(f"step 0: the samples have {real:,} targets, but the length table says {real + 1:,}; ")
    assert not (tmp_path / "run/checkpoints/step-00000002").exists()


def test_a_batch_whose_targets_are_all_cut_names_the_setting_that_cut_them(world, stage1, tmp_path):
    changes = {"init__projector": stage1.run_dir, "data__max_positions": 30, "data__cache": tmp_path / "cache"}
    state = build(world.config("demo-stage2", tmp_path / "run", **changes), initialize_distributed())
    batch = state.source[0]
    cut = batch.counts.num_truncated_tokens
    says = rf"step 0: no sample has anything to learn .*data.max_positions=30 cut {cut:,} text tokens of them; raise it"
    with pytest.raises(ValueError, match=says):
        train_step(state, batch, 0.0)
    assert cut > 0
    shutdown_distributed()


def test_waiting_is_what_the_next_batch_takes(monkeypatch):
    clock = iter([10.0, 12.5, 20.0, 20.25, 30.0])
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    assert list(loop.timed(iter("ab"))) == [("a", 2.5), ("b", 0.25)]  # pyright: ignore[reportArgumentType]
