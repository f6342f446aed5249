"""The template of a model, chosen by what its own chat template writes."""

import json
from pathlib import Path
from time import monotonic

import pytest
from transformers import PreTrainedTokenizerFast

from common.console import UsageError
from pipeline.data import template_choice
from pipeline.data.template_choice import call_apart, choose_template
from tests.pipeline.data.test_templates import byte_level

# Source: tokenizer_config.json of Qwen2-7B-Instruct, SmolLM2-135M-Instruct, Meta-Llama-3-8B-Instruct and
# Mistral-7B-Instruct-v0.2 (before and after it knew system texts), chat_template.json of llava-1.5-7b-hf.
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ message['content'] + eos_token}}{% endif %}{% endfor %}"
)
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', "
    "'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
KNOWN = {
    "Qwen2": (QWEN2, "chatml"),
    "SmolLM2": (QWEN2.replace("helpful assistant", "helpful AI assistant named SmolLM"), "chatml"),
    "Llama-3": (LLAMA_3, "llama_3"),
    "Mistral": (MISTRAL, "mistral"),
    "Mistral with spaces": (MISTRAL.replace("'[INST] '", "' [INST] '"), "mistral"),
    "LLaVA": (LLAVA, "v1"),
}


def write(folder: Path, template: str) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.mark.parametrize("model", KNOWN)
def test_the_template_of_a_model_is_that_which_writes_its_prompts(tmp_path: Path, model: str) -> None:
    own, expected = KNOWN[model]
    assert choose_template(write(tmp_path, own), byte_level()) == expected


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "processor_config.json", "several"])
def test_a_chat_template_is_found_where_transformers_puts_it(tmp_path: Path, file: str) -> None:
    if file == "several":
        several = [{"name": "tool_use", "template": LLAMA_3}, {"name": "default", "template": QWEN2}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    else:
        (tmp_path / file).write_text(QWEN2 if file.endswith("jinja") else json.dumps({"chat_template": QWEN2}))
    assert choose_template(tmp_path, byte_level()) == "chatml"


def test_a_bos_that_opens_every_turn() -> None:
    """SmolLM2's is <|im_start|>."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer, bos_token="<|im_start|>")
    found = template_choice._prompt(tokenizer, QWEN2, True, False)
    assert found is not None and found.startswith("system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is this?")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (None, r"has no chat template that says how to ask it; say which with TEMPLATE= \(--template\): plain, v1"),
        (
            "{{ messages[-1].content }}",
            "its own chat template writes prompts as none of ours does; say which with TEMP",
        ),
        ("", "as none of ours does"),
        ("{% if", "as none of ours does"),
        (QWEN2.replace("assistant\n", "assistant\n<think>"), "as none of ours does"),
    ],
)
def test_nobody_guesses(tmp_path: Path, own: str | None, message: str) -> None:
    if own is not None:
        write(tmp_path, own)
    with pytest.raises(UsageError, match=message):
        choose_template(tmp_path, byte_level())


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENORMOUS = "{% set a = namespace(x='aaaaaaaaaaaaaaaa') %}{% for b in range(99) %}{% set a.x = a.x + a.x %}{% endfor %}"


@pytest.mark.parametrize(("own", "why"), [(ENDLESS, "come to an end"), (ENORMOUS, "none of ours does")])
def test_a_chat_template_has_little_time_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, why: str
) -> None:
    monkeypatch.setattr(template_choice, "MAX_CPU_SECONDS", 1)
    monkeypatch.setattr(template_choice, "MAX_BYTES", 1 << 26)
    start = monotonic()
    with pytest.raises(UsageError, match=why):
        choose_template(write(tmp_path, own), byte_level())
    assert monotonic() - start < 60


def test_what_a_process_apart_does_is_its_own() -> None:
    seen = []
    assert call_apart(lambda: seen.append(1) or len(seen)) == 1 and not seen
