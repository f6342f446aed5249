"""The commands that bring models in and take them out, as people type them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from model.hf_check import check_export
from model.hf_read import load_config
from pipeline import import_hf
from tests.command_line import run_command
from tests.hf_compat.tiny import save_llm, save_vision
from tests.model.test_llava import save_llava, save_llava_hf
from tests.pipeline.data.test_template_choice import LLAMA_3, LLAVA, QWEN2


def test_a_base_asks_in_the_words_of_its_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_llm(tmp_path / "llm", "llama_3")
    save_vision(tmp_path / "clip", "clip")
    (tmp_path / "llm" / "chat_template.jinja").write_text(LLAMA_3)
    import_hf.main(llm=tmp_path / "llm", vision=tmp_path / "clip", out=tmp_path / "base")
    said = capsys.readouterr().out
    assert "a base, 3 layers of width 32, 4 visual tokens an image (clip_vision_model), template llama_3" in said
    assert "(answers end with <|eot_id|>)" in said
    assert "<|eot_id|>" in (tmp_path / "base" / "chat_template.jinja").read_text()
    assert '"eos_token_id": [\n    2,\n    3\n  ]' in (tmp_path / "base" / "generation_config.json").read_text()


def test_a_base_of_qwen2_ends_answers_at_both_of_its_tokens(tmp_path: Path) -> None:
    """As Qwen2-Instruct: `<|im_end|>`, which is the tokenizer's EOS, and `<|endoftext|>`."""
    save_llm(tmp_path / "llm", "qwen2")
    save_vision(tmp_path / "clip", "clip")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "llm")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", QWEN2
    tokenizer.save_pretrained(tmp_path / "llm")
    ends = sorted([2, tokenizer.convert_tokens_to_ids("<|im_end|>")])
    (tmp_path / "llm" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends[::-1]}))
    import_hf.main(llm=tmp_path / "llm", vision=tmp_path / "clip", out=tmp_path / "base")
    assert "<|im_start|>system\\nYou are a helpful" in (tmp_path / "base" / "chat_template.jinja").read_text()
    assert json.loads((tmp_path / "base" / "generation_config.json").read_text())["eos_token_id"] == ends
    assert AutoTokenizer.from_pretrained(tmp_path / "base").eos_token == "<|im_end|>"


def test_a_llava_of_either_layout_becomes_an_export_that_chats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_llava_hf(tmp_path / "llava-hf")
    (tmp_path / "llava-hf" / "chat_template.json").write_text(json.dumps({"chat_template": LLAVA}))
    import_hf.main(release=tmp_path / "llava-hf", out=tmp_path / "one")
    save_llava(tmp_path / "llava", tmp_path / "clip", brings_encoder=True)
    import_hf.main(release=tmp_path / "llava", vision=tmp_path / "clip", template="v1", out=tmp_path / "two")
    said = capsys.readouterr().out.splitlines()
    for line, folder in zip(said, ("one", "two"), strict=True):
        assert ": architecture llava, 3 layers of width 32" in line and "template v1 (answers end with </s>)" in line
        assert load_config(tmp_path / folder).architecture == "llava"
        check_export(tmp_path / folder)


def test_wrong_options_are_one_line(tmp_path: Path) -> None:
    folders = ("--vision", tmp_path / "clip", "--out", tmp_path / "base")
    save_llm(tmp_path / "llm", "llama")
    for arguments, code, message in (
        (folders, 2, "give either --llm"),
        (("--llm", tmp_path, "--out", tmp_path / "base"), 2, "--llm needs --vision"),
        (("--llm", tmp_path, *folders, "--template", "v2"), 2, "--template 'v2' must be one of plain, v1"),
        (("--llm", tmp_path, *folders, "--projector", "mpl"), 2, "--projector 'mpl' must be one of mlp, linear"),
        (("--release", tmp_path, *folders, "--projector", "linear"), 2, "a release has its own"),
        (("--llm", tmp_path, *folders), 1, "no tokenizer files"),
        (("--llm", tmp_path / "llm", *folders), 2, "llm has no chat template that says how to ask it; say which with"),
        (
            ("--release", tmp_path / "llm", *folders, "--template", "v1"),
            1,
            "model_type='llama' is no LLaVA; give a",
        ),
    ):
        status, said = run_command(import_hf.main, *arguments)
        assert status == code, said
        assert message in said and said.count("\n") == 1
