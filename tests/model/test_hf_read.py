"""Folders from somebody else: no code of theirs runs, nobody is asked, damage is one line that names the folder."""

import io
import json
import os
import struct
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from model.hf_check import check_export
from model.hf_export import check_code, load_export, load_model, load_processor
from model.hf_read import files_in_index, load_config, load_tokenizer, named, read_safetensors_file
from model.hf_source import read_checkpoint, read_json
from model.import_hf import compose_base
from model.vision import load_vision_tower
from model.weights import read_safetensors
from pipeline.data.templates import chat_templates
from pipeline.evaluation.conversation import load_chat
from pipeline.evaluation.evaluate import evaluate
from tests.hf_compat.make_folder import make_export
from tests.transformers_versions import MAJOR

DEEP = "[" * 200_000
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = {"height": 10**6, "width": 10**6}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf-read")
    make_export(folder / "work", folder / "export", "llama", "clip", "mlp")
    return folder


@pytest.fixture
def export(world: Path, tmp_path: Path) -> Path:
    return copytree(world / "export", tmp_path / "export")


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)


def change(file: Path, **changes: object) -> None:
    before = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(before | changes))


def test_what_a_library_raised_is_the_cause_of_the_line(tmp_path: Path) -> None:
    error = KeyError("weights")
    with pytest.raises(ValueError, match=f"^{tmp_path} cannot be read") as caught, named(tmp_path):
        raise error
    assert caught.value.__cause__ is error
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged") as caught:
        load_config(tmp_path)
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)


def test_code_in_an_export_does_not_run(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.json").write_text(
        json.dumps([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}])
    )
    with (export / "modeling_saisa.py").open("a") as file:
        file.write(f"\nimport os\nos.mkdir({str(tmp_path / 'executed')!r})\n")
    for use in (
        lambda: check_code(export),
        lambda: load_chat(export),
        lambda: evaluate(export, tmp_path / "rows.json", tmp_path),
    ):
        with pytest.raises(ValueError, match=r"another version .*modeling_saisa.py differs.*--trust-remote-code"):
            use()
    load_model(export)  # this repository's class
    load_processor(export)
    assert not (tmp_path / "executed").exists()
    for registered in (CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        # Transformers 5 would take classes that the code of another folder has registered in this process.
        monkeypatch.setattr(registered, "_extra_content", {})
    evaluate(export, tmp_path / "rows.json", tmp_path, trust_remote_code=True, max_new_tokens=1)
    assert (tmp_path / "executed").exists()


def test_an_export_without_code_is_data(export: Path) -> None:
    for file in export.glob("*.py"):
        file.unlink()
    assert load_chat(export, device="cpu", max_new_tokens=1).ask("a") is not None


def test_importing_a_folder_with_code_neither_asks_nor_runs_it(world: Path, tmp_path: Path) -> None:
    llm = copytree(world / "work" / "llm", tmp_path / "llm")
    (llm / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\nclass T: pass\n")
    auto_map = {"AutoTokenizer": ["evil.T", "evil.T"], "AutoConfig": "evil.T", "AutoModelForCausalLM": "evil.T"}
    change(llm / "config.json", auto_map=auto_map)
    change(llm / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="T")
    with pytest.raises(
        ValueError, match=rf"{llm} cannot be read .*contains custom code.*need code of their own"
    ) as told:
        compose_base(llm, world / "work" / "vision", tmp_path / "base")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name", ["tokenizer_file", "vocab_file", "merges_file", "spm_file", "normalizer_file", "source_spm", "vocab"]
)
def test_a_tokenizer_reads_no_file_elsewhere(export: Path, name: str) -> None:
    change(export / "tokenizer_config.json", **{name: "/etc/passwd"})
    for load in (load_tokenizer, load_processor):
        with pytest.raises(ValueError, match=f"tokenizer_config.json: {name}='/etc/passwd' names a file"):
            load(export)


def test_what_names_no_file_that_is_read_does_not_disturb(export: Path) -> None:
    before = load_tokenizer(export).get_vocab()
    harmless = {"special_tokens_map_file": "/etc/passwd", "spm_file": None, "name_or_path": "/etc/passwd"}
    change(export / "tokenizer_config.json", **harmless, init_inputs=[])
    assert load_tokenizer(export).get_vocab() == before
    change(export / "tokenizer_config.json", init_inputs=["/etc/passwd"])
    with pytest.raises(ValueError, match=r"init_inputs=\['/etc/passwd'\] may name files"):
        load_tokenizer(export)


@pytest.mark.parametrize("name", ["../victim.safetensors", "/etc/passwd", "", None, 7, "a/b"])
@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_names_files_beside_it(tmp_path: Path, name: object, stem: str) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "victim.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match="no plain file name"):
        files_in_index(folder / f"{stem}.index.json")
    with pytest.raises(ValueError, match="no plain file name"):
        list(read_checkpoint(folder))


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        header(b"{}", 1 << 60),
        header(DEEP.encode()[:90_000]),
        header(b"[]"),
        header(b'{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}') + bytes(8),
        header(b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}') + bytes(4),
        header(b'{"w": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}') + bytes(4),
        header(b'{"w": {"dtype": "F32", "shape": [9223372036854775807, 9], "data_offsets": [0, 4]}}') + bytes(4),
    ],
    ids=range(9),
)
def test_a_damaged_safetensors_file_is_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    for read in (
        lambda: list(read_safetensors_file(tmp_path / "model.safetensors")),
        lambda: list(read_safetensors(tmp_path, lambda name: True)),
        lambda: list(read_checkpoint(tmp_path)),
    ):
        with pytest.raises(ValueError, match=r"model.safetensors cannot be read .*download or write it again") as told:
            read()
        assert "\n" not in str(told.value)


class Executes:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_old_weights_are_read_as_data(tmp_path: Path) -> None:
    for content, told in (
        ({"w": Executes(tmp_path / "executed")}, "it names posix.mkdir"),
        ([1], "does not hold tensors by name"),
        ({"w": "text"}, "does not hold tensors by name"),
    ):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=f"pytorch_model.bin cannot be read .*{told}") as refused:
            list(read_checkpoint(tmp_path))
        assert "\n" not in str(refused.value)
    stream = io.BytesIO()
    torch.save({"w": torch.ones(100)}, stream)
    (tmp_path / "pytorch_model.bin").write_bytes(stream.getvalue()[:-200])
    with pytest.raises(ValueError, match="pytorch_model.bin cannot be read"):
        list(read_checkpoint(tmp_path))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "7", DEEP, "{" + '"a":{' * 100_000, "\udcff"], ids=range(7))
def test_a_damaged_config_is_one_line(export: Path, text: str) -> None:
    (export / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    for read in (check_export, load_config, load_model, lambda folder: read_json(folder / "config.json")):
        with pytest.raises(ValueError, match=r"config.json is damaged") as told:
            read(export)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "4"},
        {"num_hidden_layers": -1},
        {"hidden_size": 10**30},
        {"hidden_size": [1]},
        {"vocab_size": 1.5},
        {"vision_config": {"model_type": "clip", "image_size": 10**12}},
        {"vision_config": 7},
        {"projector_type": {}},
        {"architecture": ["saisa"]},
        {"architecture": "flamingos"},
        {"architecture": "shortv"},
        {"architecture": "shortv", "frozen_layers": "01"},
        {"architecture": "shortv", "frozen_layers": [[0]]},
        {"architecture": "shortv", "frozen_layers": [0, 10**9]},
        {"frozen_layers": 7},
        {"block_size": 0},
        {"block_size": "2"},
        {"architecture": "flamingo"},
        {"architecture": "flamingo", "cross_attention": ["llama_3_2"], "cross_attention_every": 1},
        {"architecture": "flamingo", "cross_attention": "llama_3_2", "cross_attention_every": "1"},
        {"architecture": "flamingo", "cross_attention": "llama_3_2", "cross_attention_every": -1},
        {"cross_attention": "llama_3_2"},
    ],
    ids=str,
)
def test_a_crafted_config_is_one_line(export: Path, changes: dict) -> None:
    change(export / "config.json", **changes)
    with pytest.raises(ValueError, match=f"{export}") as told:
        load_model(export)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("tokenizer.json", "", "tokenizer.json is damaged .Expecting value"),
        ("tokenizer.json", "{", "tokenizer.json is damaged .Expecting property name"),
        ("tokenizer.json", "[]", "tokenizer.json is damaged .a list instead of an object"),
        ("tokenizer.json", "{}", "Model missing"),
        ("tokenizer.json", DEEP, "tokenizer.json is damaged .it is nested more than 100 deep"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', "Missing vocab/merges"),
        ("tokenizer_config.json", "", "tokenizer_config.json is damaged .Expecting value"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is damaged .Expecting property name"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is damaged .a list instead of an object"),
        ("tokenizer_config.json", "{}", "need code of their own"),  # says no class, and that of config.json is theirs
        ("tokenizer_config.json", DEEP, "tokenizer_config.json is damaged .it is nested more than 100 deep"),
    ],
    ids=range(11),
)
def test_a_damaged_tokenizer_is_one_line(export: Path, name: str, text: str, expected: str) -> None:
    (export / name).write_text(text)
    if MAJOR > 4:  # it has other words for what its tokenizers refuse
        if expected == "need code of their own":
            pytest.skip("needs transformers 4: later ones take a class that fits the files")
        expected = expected if "is damaged" in expected else "cannot be read"
    with pytest.raises(ValueError, match=f"{export}.*{expected}") as told:
        load_tokenizer(export)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", DEEP], ids=range(5))
def test_the_old_file_of_special_tokens_is_not_read(export: Path, text: str) -> None:
    if MAJOR > 4:
        pytest.skip("needs transformers 4: later ones read it, and refuse what is damaged")
    before = load_tokenizer(export)
    (export / "special_tokens_map.json").write_text(text)
    after = load_tokenizer(export)
    assert after.special_tokens_map == before.special_tokens_map and after.get_vocab() == before.get_vocab()


def test_a_damaged_sentencepiece_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    for data in (b"", b"\0" * 100, b"\xff" * 100, os.urandom(1000)):
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(ValueError, match=f"{tmp_path}") as told:
            load_tokenizer(tmp_path)
        assert "\n" not in str(told.value)


def test_a_whole_file_reads_equal(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = dict(read_safetensors_file(tmp_path / "model.safetensors", lambda name: name == "a"))
    assert list(found) == ["a"] and torch.equal(found["a"], tensors["a"])


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("processor_config.json", {"num_image_tokens": 0}, "num_image_tokens=0, but the model has"),
        ("processor_config.json", {"num_image_tokens": 4.0}, "num_image_tokens=4.0, but the model has 4 visual tokens"),
        ("processor_config.json", {"audio_tokenizer": {}}, "audio_tokenizer names another folder"),
        ("tokenizer_config.json", {"model_input_names": -1}, "model_input_names must be a list"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "model_max_length='x' must be a number"),
        ("generation_config.json", "{", "generation_config.json is damaged"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id=x must name ids below 385"),
        ("generation_config.json", {"eos_token_id": [2, 385]}, r"eos_token_id=\[2, 385\] must name ids below 385"),
        ("generation_config.json", {"pad_token_id": [1]}, r"pad_token_id=\[1\] must name ids"),
        (
            "chat_template.jinja",
            ENDLESS,
            "chat_template.jinja is none of the templates of this version.*--trust-remote",
        ),
        ("chat_template.jinja", "{% if", "chat_template.jinja is none of the templates"),
        ("chat_template.jinja", "", "no chat_template.jinja"),
        ("chat_template.json", {"chat_template": ENDLESS}, "chat_template.jinja is none of the templates"),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}, "image_std=.* must be three numbers of 0.001 to"),
        ("preprocessor_config.json", {"image_std": "abc"}, "image_std=.* must be three numbers"),
        ("preprocessor_config.json", {"image_std": [float("nan")] * 3}, "image_std=.* must be three numbers"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "image_mean=.* must be three numbers of 0 to 1"),
        ("preprocessor_config.json", {"image_mean": 5}, "preprocessor|cannot be read"),
        ("preprocessor_config.json", {"resample": 99}, "resample=99 must be one of 0, 1, 2, 3, 4, 5"),
        ("preprocessor_config.json", {"resample": "x"}, "invalid literal for int"),
        ("preprocessor_config.json", {"size": HUGE, "crop_size": HUGE}, "must be of 1 to 4096 pixels"),
        ("preprocessor_config.json", {"crop_size": {"height": 0, "width": 0}}, "must be of 1 to 4096 pixels"),
        ("preprocessor_config.json", {"crop_size": {"height": 14, "width": 14}}, "images of 14 x 14 .*image_size=28"),
        ("config.json", {"_attn_implementation": "somebody/kernel"}, "somebody/kernel' asks for code of others"),
        (
            "config.json",
            {"quantization_config": {"quant_method": "x"}},
            "quantization_config=.* asks for code of others",
        ),
        ("config.json", {"num_labels": 10**7}, "num_labels=10000000 is no size"),
        ("config.json", {"resampler_tokens": 10**6}, "resampler_tokens=1000000 is no size"),
        ("config.json", {"vision_config": {"patch_size": 0}}, "patch_size=0: Input should be greater than 0"),
        ("config.json", {"vision_config": {"patch_size": 10**7}}, r"\[16, 3, 14, 14\], by config.json it is of shape"),
        ("config.json", {"vision_config": {"image_size": 10**6}}, "image_size=1000000 is no size"),
        ("config.json", {"vision_config": {"num_attention_heads": 3}}, "3 heads must divide hidden_size=16"),
        ("config.json", {"vision_config": {"layer_norm_eps": "x"}}, "layer_norm_eps=x must be a positive number"),
        ("config.json", {"vision_config": {"hidden_act": "x"}}, "config.json cannot be read"),
        ("config.json", {"hidden_size": 10**7}, r"shape \[385, 32\], by config.json it is of shape \[385, 10000000\]"),
        ("config.json", {"num_hidden_layers": 2}, "layers.2.* by config.json it is not there"),
        ("config.json", {"num_hidden_layers": 4}, r"lacks \d+ weights, such as model\.layers\.3\."),
        ("config.json", {"rope_theta": "x"}, "rope_theta=x: Input should be a valid number"),
        ("config.json", {"initializer_range": "x"}, "initializer_range=x must be a positive number"),
        ("config.json", {"image_token_id": "x"}, "image_token_id=x must be an id"),
        ("config.json", {"image_token_id": 0}, "image_token_id=0, but the tokenizer's is 384"),
    ],
)
def test_an_export_that_would_answer_wrongly_or_break_is_one_line(
    export: Path, name: str, changes: str | dict, told: str
) -> None:
    if name == "chat_template.json":
        (export / "chat_template.jinja").unlink()
    if isinstance(changes, dict):
        vision = json.loads((export / "config.json").read_text())["vision_config"]
        both = {key: vision | inner for key, inner in changes.items() if key == "vision_config"}
        change(export / name, **changes | both)
    else:
        (export / name).write_text(changes)
    if MAJOR > 4 and ("heads must divide" in told or "layer_norm_eps" in told):
        told = "config.json cannot be read"  # its own classes refuse these first
    with pytest.raises(ValueError, match=told) as refused:
        load_chat(export)
    assert "\n" not in str(refused.value)


def test_what_an_export_says_of_generating_does_not_change_an_answer(export: Path) -> None:
    before = load_chat(export, device="cpu", max_new_tokens=6).ask("a")
    change(
        export / "generation_config.json", num_beams=0, num_return_sequences=3, max_length=-1, repetition_penalty=50.0,
        return_dict_in_generate=True, watermarking_config={"bias": 9}, cache_implementation="x", bos_token_id="x",
    )  # fmt: skip
    layers = {"layer_types": ["x"]} if MAJOR == 4 else {}  # later ones refuse it
    change(export / "config.json", pruned_heads={"0": [1]}, num_beams=3, **layers)
    assert load_chat(export, device="cpu", max_new_tokens=6).ask("a") == before
    ends = load_export(export, chat_templates())[1].generation_config.eos_token_id
    change(export / "generation_config.json", eos_token_id=[*ends, *range(384)])
    assert len(load_chat(export, device="cpu", max_new_tokens=6).ask("a")) < len(before), "where answers end is heeded"


def replace(old: dict, new: str) -> dict:
    return {"type": "Replace", "pattern": old, "content": new}


TENFOLD = [replace({"String": "e"}, "e" * 10)]
TENFOLD_TWICE = {"type": "Sequence", "normalizers": TENFOLD * 2}
TOKENS = {"<s>": {"id": "<s>", "ids": [1] * 1000, "tokens": ["<s>"] * 1000}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": TENFOLD * 12}}, "1e.12"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": TENFOLD * 3}]}},
            "1e.03",
        ),
        ({"normalizer": replace({"Regex": ""}, "a" * 100)}, "101"),
        ({"decoder": {"type": "Sequence", "decoders": TENFOLD * 12}}, "1e.12"),
        (
            {"post_processor": {"single": [{"SpecialToken": {"id": "<s>"}}] * 100_000, "special_tokens": TOKENS}},
            "1e.08",
        ),
    ],
    ids=range(5),
)
def test_a_tokenizer_that_makes_much_of_little_is_refused(export: Path, changes: dict, told: str) -> None:
    change(export / "tokenizer.json", **changes)
    for load in (load_tokenizer, load_processor):
        with pytest.raises(
            ValueError, match=f"tokenizer.json cannot be read .one character or text may become {told}, and"
        ):
            load(export)


def test_a_tokenizer_may_replace_and_add_a_little(export: Path) -> None:
    change(export / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": TENFOLD * 2})
    assert load_tokenizer(export)("e").input_ids


def test_a_template_of_the_folder_runs_if_it_is_trusted(export: Path) -> None:
    (export / "chat_template.jinja").write_text("{{ 'a' * 3 }}")
    processor, _ = load_export(export, chat_templates(), trust_remote_code=True)
    assert processor.apply_chat_template([{"role": "user", "content": "b"}]) == "aaa"


def test_the_encoder_of_a_base_is_refused_before_it_takes_memory(world: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    compose_base(world / "work" / "llm", world / "work" / "vision", base)
    vision = json.loads((base / "config.json").read_text())["vision_config"]
    change(base / "config.json", vision_config=vision | {"intermediate_size": 10**7})
    with pytest.raises(ValueError, match=r"fc1.* has shape \[24, 16\], by config.json it is \[10000000"):
        load_vision_tower(base, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"size": {"shortest_edge": 10**6}, "crop_size": {"height": 10**6, "width": 10**6}}, "must be of 1 to 4096"),
        ({"size": "x"}, "preprocessor_config.json cannot be read"),
        ({"image_std": [1]}, "image_std=.* must be three numbers"),
        ({"rescale_factor": "x"}, "preprocessor_config.json cannot be read"),
    ],
    ids=range(4),
)
def test_the_images_of_an_encoder_are_checked(world: Path, tmp_path: Path, changes: dict, told: str) -> None:
    clip = copytree(world / "work" / "vision", tmp_path / "clip")
    change(clip / "preprocessor_config.json", **changes)
    with pytest.raises(ValueError, match=told) as refused:
        compose_base(world / "work" / "llm", clip, tmp_path / "base")
    assert "\n" not in str(refused.value) and not (tmp_path / "base").exists()


def test_weights_outside_the_export_are_not_read(export: Path) -> None:
    file = min(export.glob("*.safetensors"))
    with safe_open(file, framework="pt") as tensors:
        stored = list(tensors.keys())
    file.rename(export.parent / "outside.safetensors")
    index = export / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"] if index.is_file() else dict.fromkeys(stored, file.name)
    moved = {name: "../outside.safetensors" if at == file.name else at for name, at in names.items()}
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(ValueError, match="is no plain file name"):
        load_chat(export)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"])
def test_a_pipe_or_an_enormous_file_in_a_folder_is_one_line(export: Path, name: str) -> None:
    (export / name).unlink(missing_ok=True)
    os.mkfifo(export / name)
    for read in (load_config, load_tokenizer, load_processor, load_chat):
        with pytest.raises(ValueError, match=f"{name} is a pipe or a device|no config.json"):
            read(export)
    (export / name).unlink()
    if name.endswith(".json"):
        with (export / name).open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(ValueError, match=f"{name} (has more than|is damaged .1,099,511,627,776 bytes)"):
            load_chat(export)
