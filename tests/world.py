"""A tiny world to train in: drawn shapes, a random base, shards written by Ray. Built once a test session."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep.plan import Settings
from data_prep.shapes import write_dataset
from data_prep.shards import make_shards
from model.import_hf import compose_base
from orchestration.tiny_base import PHRASES, build_tiny_clip, build_tiny_llm, read_texts, train_tokenizer
from pipeline.config import RunConfig, load_config
from pipeline.templates import chat_template
from pipeline.train import train

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class World:
    """Folders that runs can use, and how to configure them."""

    root: Path

    def overrides(self, run_dir: Path, **changes: object) -> list[str]:
        """Returns `a.b=c` settings for a demo recipe in this world; `a__b=c` adds to them."""
        settings = {
            "run_dir": run_dir,
            "init.base": self.root / "base",
            "data.shards": self.root / "shards",
            "data.template": "v1",
            "data.max_text_tokens_per_pack": 256,
            "data.cache": self.root / "cache",
            "data.prefetch_steps": 0,
            "model.num_layers": 2,
            "model.vocab_size": 384,
            "model.hidden_size": 32,
            "model.ffn_hidden_size": 48,
            "model.num_attention_heads": 2,
            "model.num_query_groups": 1,
            "model.head_dim": 16,
            "model.max_positions": 256,
            "model.vision.hidden_size": 32,
            "train.global_batch_size": 8,
            "train.max_steps": 6,
            "train.seed": 7,
            "log.tensorboard": "false",
            **{name.replace("__", "."): value for name, value in changes.items()},
        }
        return [f"{name}={value}" for name, value in settings.items()]

    def config(self, recipe: str, run_dir: Path, **changes: object) -> RunConfig:
        """Returns a demo recipe, made small, for this world."""
        return load_config(CONFIGS / f"{recipe}.yaml", self.overrides(run_dir, **changes))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    write_dataset(root / "data", num_train=60, num_test=8, seed=0, image_size=64)
    build_tiny_llm(
        train_tokenizer(read_texts(root / "data/finetune.json"), PHRASES[1:], vocab_size=384),
        root / "llm",
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_positions=256,
    )
    build_tiny_clip(root / "clip", hidden_size=32)
    compose_base(root / "llm", root / "clip", root / "base", chat_template=chat_template("v1"))
    make_shards(root / "data/finetune.json", root / "data/images", root / "shards", Settings(), workers=1)
    return World(root)


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
