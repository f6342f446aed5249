"""A tiny world to train in: drawn shapes, a random base, shards. Built once a test session."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.plan import Settings
from data_prep.shapes import write_dataset
from model.import_hf import compose_base
from orchestration.tiny_base import read_texts
from orchestration.tiny_models import PHRASES, build_tiny_clip, build_tiny_llm, train_tokenizer
from pipeline.config import RunConfig, load_config
from pipeline.data.templates import chat_template
from pipeline.loop import train
from tests.shard_sets import shard_here

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class World:
    """Folders that runs can use, and how to configure them."""

    root: Path
    sizes: dict[str, int]
    batch_size: int = 8

    def overrides(self, run_dir: Path, **changes: object) -> list[str]:
        """Returns `a.b=c` settings for a demo recipe in this world; `a__b=c` adds to them."""
        settings = {
            "run_dir": run_dir,
            "init.base": self.root / "base",
            "data.shards": self.root / "shards",
            "data.template": "v1",
            "data.max_positions": self.sizes["max_positions"],
            "data.max_text_tokens_per_pack": self.sizes["max_positions"],
            "data.cache": self.root / "cache",
            "data.prefetch_steps": 0,
            **{f"model.{name}": size for name, size in self.sizes.items()},
            "train.global_batch_size": self.batch_size,
            "train.max_steps": 6,
            "train.seed": 7,
            "log.tensorboard": "false",
            **{name.replace("__", "."): value for name, value in changes.items()},
        }
        return [f"{name}={value}" for name, value in settings.items()]

    def config(self, recipe: str, run_dir: Path, **changes: object) -> RunConfig:
        """Returns a demo recipe, made small, for this world."""
        return load_config(CONFIGS / f"{recipe}.yaml", self.overrides(run_dir, **changes))


SIZES = {
    "num_layers": 2,
    "vocab_size": 384,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "head_dim": 16,
    "max_positions": 256,
    "vision.hidden_size": 32,
}
# can be divided by two in every way; the vocabulary is no multiple of what it is filled up to
DEEP_SIZES = SIZES | {
    "num_layers": 4,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 8,
    "vocab_size": 380,
    "max_positions": 320,
}
DEEP_STEPS = 4  # of runs that are divided in every way: enough for warm-up, decay and a checkpoint in the middle


def build_world(root: Path, sizes: dict[str, int], rows_file: str = "finetune.json") -> World:
    """Returns a world whose shards hold the rows of a file of the drawn data set."""
    build_tiny_llm(
        train_tokenizer(read_texts(root / "data/finetune.json"), PHRASES[1:], vocab_size=sizes["vocab_size"]),
        root / "llm",
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["ffn_hidden_size"],
        num_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_query_groups"],
        max_positions=sizes["max_positions"],
    )
    build_tiny_clip(root / "clip", hidden_size=sizes["vision.hidden_size"])
    compose_base(root / "llm", root / "clip", root / "base", chat_template=chat_template("v1"))
    shard_here(root / "data" / rows_file, root / "data/images", root / "shards", Settings())
    return World(root, sizes)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    write_dataset(root / "data", num_train=60, num_test=8, seed=0, image_size=64)
    return build_world(root, SIZES)


@pytest.fixture(scope="session")
def deep_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with a model that can be divided, and rows of no, one and two images."""
    root = tmp_path_factory.mktemp("deep")
    write_dataset(root / "data", num_train=60, num_test=8, seed=0, image_size=64)
    rows = json.loads((root / "data/finetune.json").read_text())
    for one, other in zip(rows[0::5], rows[1::5], strict=False):
        if "image" in one and "image" in other:
            one["image"] = [one["image"], other["image"]]
            first, answer, *_ = one["conversations"]
            one["conversations"] = [first | {"value": "<image>\n" + first["value"]}, answer]
    (root / "data/mixed.json").write_text(json.dumps(rows))
    return replace(build_world(root, DEEP_SIZES, "mixed.json"), batch_size=7)  # no two ranks have the same work


@pytest.fixture(scope="session")
def photo_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with pictures that must be resized and padded or cropped: JPEGs and a PNG, wide and high."""
    root = tmp_path_factory.mktemp("photos")
    generator, rows = np.random.default_rng(0), []
    for number, (width, height) in enumerate([(90, 70), (70, 150), (64, 64), (130, 80), (80, 100)]):
        pixels = generator.integers(0, 256, (height // 10, width // 10, 3), np.uint8)
        name = f"{number}.{'png' if number == 3 else 'jpg'}"
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(root / name)
        turns = [("human", "<image>\nWhat is it?"), ("gpt", f"picture {number}")]
        conversations = [{"from": speaker, "value": value} for speaker, value in turns]
        rows.append({"id": f"photo-{number}", "image": name, "conversations": conversations})
    (root / "rows.json").write_text(json.dumps(rows))
    return shard_here(root / "rows.json", root, root / "shards", Settings())


@pytest.fixture(scope="session")
def stage1(world: World, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished stage 1."""
    config = world.config("demo-stage1", tmp_path_factory.mktemp("runs") / "stage1", optim__learning_rate=1e-2)
    train(config)
    return config


@pytest.fixture(scope="session")
def stage2(world: World, stage1: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished stage 2 that saved every second step."""
    changes = {"init__projector": stage1.run_dir, "checkpoint__save_every_steps": 2, "checkpoint__keep_last": 9}
    config = world.config("demo-stage2", tmp_path_factory.mktemp("runs") / "stage2", **changes)
    train(config)
    return config


@pytest.fixture(scope="session")
def deep_stage1(deep_world: World, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished stage 1 of a model that can be divided: four layers, two key/value heads."""
    folder = tmp_path_factory.mktemp("runs") / "stage1"
    config = deep_world.config("demo-stage1", folder, optim__learning_rate=1e-2, train__max_steps=DEEP_STEPS)
    train(config)
    return config


@pytest.fixture(scope="session")
def deep_stage2(deep_world: World, deep_stage1: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished stage 2 of a model that can be divided."""
    folder = tmp_path_factory.mktemp("runs") / "stage2"
    changes = {"init__projector": deep_stage1.run_dir, "train__max_steps": DEEP_STEPS, "checkpoint__keep_last": 9}
    config = deep_world.config("demo-stage2", folder, **changes, checkpoint__save_every_steps=DEEP_STEPS // 2)
    train(config)
    return config
