"""Configuration: shipped files, overrides, and messages that say the way out."""

import os
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from common.console import UsageError
from pipeline.config import RunConfig, check_places, load_config, to_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_file_loads_and_survives_print_config(path, tmp_path):
    config = load_config(path, [])
    printed = tmp_path / "printed.yaml"
    printed.write_text(to_yaml(config))
    assert load_config(printed, []) == config


@pytest.mark.parametrize("name", ["vicuna-7b", "llama3-8b", "mistral-7b"])
def test_recipes_have_the_hyper_parameters_of_table_8(name):
    stage1, stage2 = (load_config(CONFIGS / f"saisa-{name}-stage{n}.yaml", []) for n in (1, 2))
    assert (stage1.phase, stage2.phase) == ("pretrain", "finetune")
    assert (stage1.optim.learning_rate, stage2.optim.learning_rate) == (1e-3, 2e-5)
    assert (stage1.train.global_batch_size, stage2.train.global_batch_size) == (256, 128)
    assert (stage1.data.template, stage1.data.image_aspect_ratio) == ("plain", "square")
    assert (stage2.data.image_aspect_ratio, stage2.data.max_positions) == ("pad", 2048)
    for config in (stage1, stage2):
        assert (config.optim.warmup_fraction, config.optim.weight_decay, config.train.num_epochs) == (0.03, 0, 1)
        assert (config.optim.adam_beta1, config.optim.adam_beta2, config.compute.precision) == (0.9, 0.999, "bf16")
        assert config.model.vision.num_tokens == 576


def test_overrides_win_over_the_file():
    config = load_config(
        CONFIGS / "demo-stage1.yaml", ["optim.learning_rate=5e-4", "model.num_layers=2", "train.max_steps=null"]
    )
    assert (config.optim.learning_rate, config.model.num_layers, config.train.max_steps) == (5e-4, 2, None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rat=1", "unknown setting optim.learning_rat (did you mean 'learning_rate'?)"),
        ("model.vision.pach_size=1", "unknown setting model.vision.pach_size (did you mean 'patch_size'?)"),
        ("data.template=vicuna", "data.template='vicuna' is unknown; use one of"),
        ("data.template=lama_3", "(did you mean 'llama_3'?)"),
        ("data.max_positions=9999", "must be at most model.max_positions=1024"),
        ("data.max_text_tokens_per_pack=8", "must be at least data.max_positions=256"),
        ("model.num_query_groups=3", "must divide model.num_attention_heads=4; use one of [1, 2, 4]"),
        ("model.vision.select_layer=-9", "must be one of the 3 hidden states"),
        ("checkpoint.resume=previous", "checkpoint.resume='previous' is called newest_whole now"),
        ("train.global_batch_size=0", "train.global_batch_size=0: must be greater than 0"),
        ("compute.precision=fp64", "compute.precision=fp64: must be 'bf16', 'fp32' or 'fp8'"),
        (
            "compute={precision: fp8, fp8_weights: true}",
            "phase=pretrain: checkpoints keep fp32 copies of trained weights",
        ),
        ("train.max_steps=1.5", "train.max_steps=1.5: must be a whole number, such as 8"),
        ("optim.adam_epsilon=small", "optim.adam_epsilon=small: must be a number, such as 2e-5"),
        ("log.tensorboard=maybe", "log.tensorboard=maybe: must be true or false"),
        ("run_dir=[a, b]", "run_dir=['a', 'b']: must be the path of a file or folder"),
        ("run_dir=", "run_dir is required and missing; set it in the file or as run_dir=..."),
        ("optim=3", "optim is a section, not 3; set optim.learning_rate=... and so on"),
        ("data.template={x: y}", "data.template is a single setting, it has no x inside"),
        ("data.shards=[{locatio: x}]", "unknown setting data.shards.0.locatio (did you mean 'location'?)"),
        ("data.shards=[]", "data.shards=[]: must name at least one"),
        ("parallel.layers_per_stage=[1, x]", "parallel.layers_per_stage.1=x: must be a whole number"),
        ("parallel.reduce_in_bf16=true", "and compute.precision=fp32 has none; use compute.precision=bf16 or fp8"),
        ("optim.learning_rate", "must look like section.key=value"),
        ("phase.x=1", "'phase' is a single value"),
    ],
)
def test_a_wrong_setting_says_the_way_out_in_one_line(override, message):
    with pytest.raises(UsageError) as error:
        load_config(CONFIGS / "demo-stage1.yaml", [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_recomputing_under_fp8_needs_an_input_with_a_gradient():
    settings = ["compute.precision=fp8", "compute.recompute=full"]
    load_config(CONFIGS / "demo-stage1.yaml", settings)
    with pytest.raises(UsageError, match="gives no gradient where .*; use compute.recompute=none"):
        load_config(CONFIGS / "demo-stage1.yaml", [*settings, "model.pretrain_projectors=own"])


FLAMINGO = [f"model.{s}" for s in ("architecture=flamingo", "cross_attention=llama_3_2", "cross_attention_every=4")]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compute={precision: fp8, fp8_weights: true}", "whose language model stays as it is"),
        ("compute.attention=block", "blocks of cross-attention have no such kernel; use compute.attention=auto"),
    ],
)
def test_flamingo_refuses_what_its_blocks_cannot_do(override, message):
    with pytest.raises(UsageError, match=message):
        load_config(CONFIGS / "saisa-vicuna-7b-stage2.yaml", [*FLAMINGO, override])


@pytest.mark.parametrize("text", ["20241107", "2024-11-07", "007", "1e5", "12:30:00", "true", "0x10"])
def test_a_path_or_a_text_is_what_was_typed(text, tmp_path):
    """YAML makes a number, a date, 7, a string, 45000, True and 16 of these."""
    stage1 = yaml.safe_load((CONFIGS / "demo-stage1.yaml").read_text())
    typed = (CONFIGS / "demo-stage1.yaml").read_text().replace(str(stage1["run_dir"]), text)
    file = tmp_path / "run.yaml"
    file.write_text(typed.replace("models/", f"{CONFIGS}/models/"))
    overrides = [f"init.base={text}", f"data.shards=[{{location: {text}}}]", f"log.wandb_project={text}"]
    config = load_config(file, overrides)
    assert (str(config.run_dir), str(config.init.base)) == (text, text)
    assert (config.data.shards[0].location, config.log.wandb_project) == (text, text)


def test_no_number_of_any_section_may_be_infinite_or_nothing():
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    floats = [
        f"{section}.{name}"
        for section, kind in sections.items()
        if isinstance(kind, type) and issubclass(kind, BaseModel)
        for name, field in kind.model_fields.items()
        if field.annotation in (float, float | None)
    ]
    assert len(floats) >= 9 and "optim.learning_rate" in floats and "log.peak_tflops" in floats
    for name in [*floats, "data.shards=[{location: x, repeat"]:
        for number in ("inf", ".inf", "nan", "-.inf"):
            with pytest.raises(UsageError, match="number|greater|least"):
                load_config(
                    CONFIGS / "demo-stage1.yaml", [f"{name}={number}" if "[" not in name else f"{name}: {number}}}]"]
                )


def test_a_file_that_is_not_text_says_so(tmp_path):
    (tmp_path / "run.yaml").write_bytes("run_dir: l\u00e4ufe".encode("latin-1"))
    with pytest.raises(UsageError, match=r"run.yaml: not UTF-8 .* save it as that"):
        load_config(tmp_path / "run.yaml", [])


def test_a_run_needs_the_folders_it_starts_from(tmp_path):
    base = tmp_path / "base"
    places = [f"init.base={base}", f"init.projector={tmp_path / 'stage1'}"]
    config = load_config(CONFIGS / "demo-stage2.yaml", places)
    with pytest.raises(
        ValueError, match=f"{base}: no base folder here .no config.json.; make one with `make import-hf`"
    ):
        check_places(config)
    base.mkdir()
    (base / "config.json").touch()
    with pytest.raises(ValueError, match=f"init.projector={tmp_path}/stage1: no such folder; run stage 1 first"):
        check_places(config)
    (tmp_path / "stage1").mkdir()
    check_places(config)
    check_places(load_config(CONFIGS / "demo-stage1.yaml", places[:1]))


def test_a_finetune_needs_projectors_to_start_from():
    with pytest.raises(UsageError, match="set init.projector to the run folder of stage 1"):
        load_config(CONFIGS / "demo-stage2.yaml", ["init.projector=random"])


def test_a_missing_section_a_missing_file_and_broken_yaml(tmp_path):
    values = yaml.safe_load((CONFIGS / "demo-stage1.yaml").read_text()) | {
        "model": str(CONFIGS / "models/saisa-tiny.yaml")
    }
    del values["optim"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError, match="optim is required and missing"):
        load_config(path, [])
    with pytest.raises(UsageError, match="No such file"):
        load_config(tmp_path / "none.yaml", [])
    path.write_text("a: [")
    with pytest.raises(UsageError, match="not valid YAML"):
        load_config(path, [])


@pytest.mark.parametrize(
    "override",
    ["optim.learning_rate=!!timestamp x", "log.tensorboard=!!bool x", "train.seed=!!int abc", "phase=" + "[" * 3000],
)
def test_what_yaml_breaks_on_is_one_line_that_names_the_setting(override):
    with pytest.raises(UsageError, match=override.partition("=")[0]) as refused:
        load_config(CONFIGS / "demo-stage1.yaml", [override])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: &a [x]\nb: *a\n", "anchors .&. and aliases ... are not taken; write the values out .* line 1"),
        ("model:\n  <<: *a\n", "anchors"),
        ("phase: " + "[" * 30_000, "maximum recursion depth"),
        ("a: " * 20_000, "not valid YAML"),
        ("a: [" + "x," * 40_000 + "]", "more than 65,536 bytes"),
        ("!" * 60_000, "not valid YAML"),
    ],
    ids=range(6),
)
def test_yaml_that_grows_when_it_is_read_is_refused_at_once(tmp_path, text, told):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UsageError, match=f"run.yaml: .*{told}") as refused:
        load_config(tmp_path / "run.yaml", [])
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_a_configuration_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "run.yaml").write_text("model: pipe.yaml\n")
    for name in ("pipe.yaml", "zero.yaml", "run.yaml"):
        with pytest.raises(UsageError, match=r"(pipe|zero).yaml is a pipe or a device"):
            load_config(tmp_path / name, [])
