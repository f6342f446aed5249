"""Which settings a run must keep when it is resumed. A new setting has to be entered in one of the two lists."""

from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.checkpoint.run_info import check_run, describe_run, read_info

FREE = {
    *("run_dir", "init.base", "data.shards", "init.projector"),  # their contents count, not where they lie
    *(
        "data.cache",
        "data.cache_limit",
        "data.row_multiple",
        "data.num_workers",
        "data.prefetch_steps",
        "data.max_bad_samples",
    ),
    *("train.num_epochs", "train.max_steps"),  # told by the number of steps
    *("train.image_batch_size", "train.gc_every_steps"),
    *("compute.attention", "compute.recompute", "compute.fused_kernels", "compute.gradient_accumulation_fusion"),
    "compute.fp8_weights",
}
FREE_SECTIONS = {"parallel", "checkpoint", "log"}
KEPT = {
    "phase": "pretrain",
    "data.shards_in_use": 3,
    "data.template": "plain",
    "data.image_aspect_ratio": "square",
    "data.max_positions": 99,
    "data.max_text_tokens_per_pack": 999,
    "data.max_images_per_pack": 3,
    "data.exact_images": True,
    "data.special_tokens": "plain",
    "optim.learning_rate": 0.5,
    "optim.warmup_fraction": 0.5,
    "optim.weight_decay": 0.5,
    "optim.adam_beta1": 0.5,
    "optim.adam_beta2": 0.5,
    "optim.adam_epsilon": 0.5,
    "optim.clip_grad_norm": 0.5,
    "optim.moments": "bf16",
    "train.global_batch_size": 3,
    "train.seed": 3,
    "compute.precision": "fp32",
    "compute.fp8_recipe": "blockwise",
    "compute.bf16_edge_layers": 1,
}


@pytest.fixture
def fp8_config(world, stage1, tmp_path):
    return world.config("demo-stage2", tmp_path, init__projector=stage1.run_dir, compute__precision="fp8")


def test_every_setting_is_kept_or_free(fp8_config):
    settings = {
        f"{section}.{name}" if isinstance(value, dict) else section
        for section, value in fp8_config.model_dump().items()
        for name in (value if isinstance(value, dict) else [""])
        if section not in FREE_SECTIONS | {"model"}
    }
    assert settings == FREE | KEPT.keys() and not FREE & KEPT.keys()


@pytest.mark.parametrize("setting", KEPT)
def test_a_setting_that_is_kept_is_compared(setting, fp8_config):
    *sections, name = setting.split(".")
    changed = fp8_config
    if sections:
        section = getattr(fp8_config, sections[0])
        assert getattr(section, name) != KEPT[setting]
        changed = fp8_config.model_copy(update={sections[0]: section.model_copy(update={name: KEPT[setting]})})
    else:
        changed = fp8_config.model_copy(update={name: KEPT[setting]})
    assert describe_run(changed, ["shards"], 6) != describe_run(fp8_config, ["shards"], 6)


def test_so_are_the_shards_and_the_number_of_steps(fp8_config):
    run = describe_run(fp8_config, ["shards"], 6)
    assert describe_run(fp8_config, ["others"], 6) != run != describe_run(fp8_config, ["shards"], 7)


def test_a_checkpoint_from_before_a_setting_says_so(fp8_config):
    run = describe_run(fp8_config, ["shards"], 6)
    facts = asdict(run)
    check_run(Path("step"), {"run": facts}, run)
    optim = {name: value for name, value in facts["optim"].items() if name != "moments"}
    old = {name: value for name, value in facts.items() if name != "special_tokens"} | {"optim": optim}
    with pytest.raises(ValueError, match=r"^step: was written before special_tokens, optim.moments existed.*run_dir"):
        check_run(Path("step"), {"run": old}, run)
    with pytest.raises(ValueError, match=r"another run: seed was 8, is 7\. Use the same settings"):
        check_run(Path("step"), {"run": old | {"seed": 8}}, run)


def test_a_checkpoint_from_before_phases_were_called_so_says_what_to_do(tmp_path):
    (tmp_path / "info.json").write_text('{"run": {"stage": "pretrain"}, "config": {"stage": "pretrain"}, "step": 3}')
    with pytest.raises(ValueError, match=r"older version, which has `stage=pretrain` where .* `phase`; export it with"):
        read_info(tmp_path)
    (tmp_path / "info.json").write_text('{"run": {"stage": "pretrain"}, "config": 3, "step": 3}')
    with pytest.raises(ValueError, match="not written by this project, or damaged"):
        read_info(tmp_path)
