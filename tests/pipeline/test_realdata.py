"""Real photos, captions and a real tokenizer through shards and both stages."""

import json

from data_prep.plan import Settings
from orchestration.tiny_models import build_tiny_base
from pipeline.config import load_config
from pipeline.loop import train
from pipeline.metrics import read_metrics
from tests.shard_sets import shard_here
from tests.world import CONFIGS


def test_photos_and_the_mistral_tokenizer_train_in_both_stages(realdata, tmp_path):
    photos = realdata / "coco_photos"
    for name in ("pretrain", "instruct"):
        shard_here(photos / f"llava_{name}.json", photos / "images", tmp_path / name, Settings())
    config = build_tiny_base([], tmp_path / "base", tokenizer=realdata / "tokenizers/mistral_v1_hf")
    assert config.vocab_size == 32000
    same = [
        "model.vocab_size=32000",
        f"init.base={tmp_path / 'base'}",
        "train.global_batch_size=13",
        "train.num_epochs=1",
    ]
    same += ["data.max_positions=1024", "log.tensorboard=false"]
    stage1, stage2 = tmp_path / "stage1", tmp_path / "stage2"
    overrides = [f"data.shards={tmp_path / 'pretrain'}", f"run_dir={stage1}"]
    train(load_config(CONFIGS / "demo-stage1.yaml", [*same, *overrides]))
    overrides = [f"data.shards={tmp_path / 'instruct'}", f"run_dir={stage2}", f"init.projector={stage1}"]
    train(load_config(CONFIGS / "demo-stage2.yaml", [*same, *overrides]))

    captions, turns = read_metrics(stage1), read_metrics(stage2)
    assert [step["num_samples"] for step in captions] == [13, 13, 13]
    assert sum(step["num_dropped_targets"] for step in captions) == 39, "the first token of each caption"
    assert sum(step["num_skipped"] for step in captions + turns) == 0
    assert turns[-1]["loss"] < turns[0]["loss"]
    rows = json.loads((photos / "llava_instruct.json").read_text())
    answers = sum(len(row["conversations"]) // 2 for row in rows)
    assert sum(step["num_targets"] for step in turns) > 5 * answers
