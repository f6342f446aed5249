"""A run whose encoder is timm's: trained, exported, and the same there."""

import pytest

from model.import_hf import compose_base
from pipeline.checkpoint.run_info import find_checkpoint
from pipeline.data.templates import chat_template
from pipeline.export_hf import export
from pipeline.loop import train
from tests.model.test_timm import save_encoder
from tests.pipeline.test_export import assert_logits_are_those_of

pytest.importorskip("timm", reason="needs timm: pip install timm")


@pytest.mark.slow
def test_a_run_with_an_encoder_of_timm_trains_and_leaves(world, tmp_path):
    save_encoder(tmp_path / "encoder", "test_convnext")
    compose_base(world.root / "llm", tmp_path / "encoder", tmp_path / "base", chat_template=chat_template("v1"))
    sizes = {"type": "timm", "hidden_size": 64, "num_layers": 4, "image_size": 64, "patch_size": 32, "select_layer": -1}
    settings = {f"model__vision__{name}": size for name, size in sizes.items()}
    changes = settings | {"init__base": tmp_path / "base", "train__max_steps": 2}
    config = world.config("demo-stage1", tmp_path / "run", **changes)
    train(config)
    assert config.model.num_tokens_per_image == 4
    export(find_checkpoint(config.run_dir), tmp_path / "out")
    assert_logits_are_those_of(config, tmp_path / "out")
