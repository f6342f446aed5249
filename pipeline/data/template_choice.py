"""Which template asks a model in the words it knows: that whose prompt is the prompt of the model's own chat template.

A chat template is somebody else's program. It runs in a process of its own, in the sandbox of transformers, and with
little time and memory: nothing else would end one that never does.
"""

import multiprocessing
import os
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from common.console import UsageError
from model.hf_source import own_chat_template
from pipeline.data.templates import PLAIN, TEMPLATES, Tokenizer, chat_template

MAX_CPU_SECONDS, MAX_SECONDS = 5, 60
MAX_BYTES = 1 << 30
SYSTEM, QUESTION = "Be brief.", "What is this?"


def choose_template(folder: Path, tokenizer: Tokenizer) -> str:
    """Returns the name of the template whose prompts are those of a model's own chat template.

    They are compared with a system text, where a template has one: which text stands there by default may differ. A
    BOS in the model's own, and spaces before a prompt, make no difference either.

    Args:
        folder: Of a language model or a LLaVA, with its chat template.
        tokenizer: Its tokenizer.

    Raises:
        UsageError: There is no chat template, or none of the templates writes its prompts.
    """
    own, way_out = own_chat_template(folder), f"say which with TEMPLATE= (--template): {', '.join(TEMPLATES)}"
    if own is None:
        raise UsageError(f"{folder} has no chat template that says how to ask it; {way_out} (v1 for Vicuna and LLaVA)")
    kinds = [(has_system, as_parts) for has_system in (True, False) for as_parts in (True, False)]
    prompts = call_apart(lambda: [_prompt(tokenizer, own, *kind) for kind in kinds])
    theirs = set(zip((has_system for has_system, _ in kinds), prompts or [], strict=False))
    for name, form in TEMPLATES.items():
        has_system = form.system is not None
        if form is not PLAIN and (has_system, _prompt(tokenizer, chat_template(name), has_system, False)) in theirs:
            return name
    why = "writes prompts as none of ours does" if prompts else "does not come to an end"
    raise UsageError(f"{folder}: its own chat template {why}; {way_out}")


def call_apart(work: Callable[[], Any]) -> Any:
    """Returns what a function returns in a process of its own; None if that takes too much time or memory."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process: Any = multiprocessing.get_context("fork").Process(target=_work_within_limits, args=(work, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(MAX_SECONDS) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


def _work_within_limits(work: Callable[[], Any], sender: Connection) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS))
    sender.send(work())


def _prompt(tokenizer: Tokenizer, template: str, has_system: bool, as_parts: bool) -> str | None:
    """Returns the prompt that a chat template writes, without BOS and spaces before it; None if it refuses to."""
    said = [("system", SYSTEM)] * has_system + [("user", QUESTION)]
    messages: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text} for role, text in said
    ]
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # whatever the template's author thought of
        return None
    return str(text).removeprefix(str(tokenizer.bos_token or "")).lstrip()
