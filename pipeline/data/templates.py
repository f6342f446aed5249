r"""From a LLaVA conversation to token ids and labels, and the chat template that asks in the same words.

Five templates; what a model is trained to say is between >< (`eos` is the tokenizer's own, `</s>` for Vicuna)::

    plain     <image>>a cake\n<                                    the question is dropped
    v1        {system} USER: {question} ASSISTANT:> {answer}{eos}<USER: ...
    llama_3   <|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>
              <|start_header_id|>assistant<|end_header_id|>\n\n>{answer}<|eot_id|><   (written without line breaks)
    mistral    [INST] {question} [/INST]> {answer}{eos}< [INST] ...     with the spaces of Mistral-7B-Instruct-v0.2
    chatml    <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n      Qwen2's, and SmolLM2's but for this text
              <|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n>{answer}<|im_end|><\n<|im_start|>user ...

`plain` and `v1` give the token ids and masks of LLaVA's `preprocess_plain` and `preprocess_v1`; the others strip each
turn, and `llama_3` and `mistral` know no standard system text. What a newcomer to LLaVA would not guess:

- A turn with one `<image>` has it moved to its front, followed by a newline. A turn with several keeps them where they
  stand (LLaVA would keep only one of them). `plain` keeps the images, and nothing else, of the human turn.
- The text between two images is tokenised on its own, so a tokenizer that opens a text with a space does so after
  each image. Whoever prompts the model must encode with `encode_text` or do the same.
- The tokenizer adds BOS, if it does so by default; neither the templates nor the chat templates write it.
- A turn that spells a special token (`</s>`, `<|im_end|>`) is refused, or plain text by `data.special_tokens`; LLaVA
  reads most of them as the token.
- A leading gpt turn is skipped. A leading system turn replaces the standard one (LLaVA refuses it).
- Where LLaVA finds its own sums wrong ("tokenization mismatch"), prints a line and trains on nothing, the row raises
  `ConversationError`. But LLaVA's sums also fail for every row with two answers when the tokenizer
  opens no text with a space and has `legacy=False`; answers are found by their tokens here, so those rows are fine.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, cast

from tokenizers import AddedToken

from common.console import UsageError, count_text
from common.tokens import IMAGE_TOKEN

if TYPE_CHECKING:  # transformers takes seconds to import, and the configuration imports this file
    from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

type Tokenizer = PreTrainedTokenizer | PreTrainedTokenizerFast
type Encode = Callable[[str], list[int]]
SpecialTokens = Literal["refuse", "plain"]
"""What becomes of a turn that spells a special token of the tokenizer: the row is refused, or it is plain text."""

IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100
PRIVATE = "\ufdd0"  # no character, says Unicode: it tells the template's own tokens from spelled ones


class ConversationError(ValueError):
    """A conversation that cannot be encoded without guessing: the row is at fault, not the run. Count it, go on."""


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids with `IMAGE_TOKEN_INDEX` for each image, and at each place the id to learn or `IGNORE_INDEX`."""

    token_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Template:
    """The text around the turns of a conversation.

    A round is `user[0] question user[1] header` (the prompt) and `gap answer end` (what is learned).

    Args:
        user: text before and after a question.
        header: end of the prompt, after which the model speaks.
        gap: text between the header and the answer.
        end: token that closes an answer; None means the tokenizer's EOS.
        system: text before and after a system turn; None refuses such a turn.
        default_system: how a conversation without a system turn begins, complete.
        special_tokens: tokens that the tokenizer must know as one id, besides the end token.
        markers: text that a turn may not contain, besides all those tokens, because it has a meaning here.
        strip: turns lose the white space around them.
    """

    user: tuple[str, str]
    header: str
    gap: str
    end: str | None = None
    system: tuple[str, str] | None = None
    default_system: str = ""
    special_tokens: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    strip: bool = False


# Source: conv_vicuna_v1 and conv_llava_plain in LLaVA's llava/conversation.py; the chat templates in the tokenizer
# configurations of Meta-Llama-3-8B-Instruct, Mistral-7B-Instruct-v0.2 and Qwen2-7B-Instruct.
PLAIN = Template(user=("", ""), header="", gap="", end="\n")
TEMPLATES = {
    "plain": PLAIN,
    "v1": Template(
        user=("USER: ", " "),
        header="ASSISTANT:",
        gap=" ",
        system=("", " "),
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
    ),
    "llama_3": Template(
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        header="<|start_header_id|>assistant<|end_header_id|>\n\n",
        gap="",
        end="<|eot_id|>",
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        special_tokens=("<|start_header_id|>", "<|end_header_id|>"),
        strip=True,
    ),
    "mistral": Template(user=(" [INST] ", " [/INST]"), header="", gap=" ", markers=("[INST]", "[/INST]"), strip=True),
    "chatml": Template(
        user=("\n<|im_start|>user\n", "<|im_end|>\n"),
        header="<|im_start|>assistant\n",
        gap="",
        end="<|im_end|>",
        system=("<|im_start|>system\n", "<|im_end|>"),
        default_system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>",
        special_tokens=("<|im_start|>",),
        strip=True,
    ),
}


def encode_conversation(
    conversations: list[dict],
    has_image: bool,
    template: str,
    tokenizer: Tokenizer,
    special_tokens: SpecialTokens = "refuse",
) -> EncodedConversation:
    """Returns the token ids of a conversation and their labels, not shifted and not truncated.

    No special token comes from a turn: those of the template and BOS are the only ones.

    Args:
        conversations: turns `{"from": "human" | "gpt", "value": text}`, in alternation, gpt last.
        has_image: the record has images; without, `<image>` in the text is an error.
        template: a name in `TEMPLATES`.
        tokenizer: slow or fast; its BOS is added if it adds it by default.
        special_tokens: what becomes of turns that spell a special token; `plain` needs a fast tokenizer.

    Raises:
        ConversationError: the turns do not fit the template, or hold text that means something to it.
        UsageError: the template is unknown.
        ValueError: the tokenizer does not know the template's special tokens, adds others than BOS, or is slow.
    """
    form, end = _find(template), end_of_answer(template, tokenizer)
    is_plain, end_id = form is PLAIN, cast(int, tokenizer.convert_tokens_to_ids(end))
    own = () if is_plain else (end, *form.special_tokens)
    control = control_tokens(tokenizer, own)
    encode: Encode = lambda text: _encode(text, tokenizer)  # noqa: E731
    if _spells_special_token(conversations[-1:] if is_plain else conversations, control, special_tokens):
        encode = plain_encoder(tokenizer, own)
        form, end, own = _marked_form(form, own), end if is_plain else _marked(end), tuple(map(_marked, own))
    rounds = _plain_round(conversations, has_image) if is_plain else _rounds(conversations, form, end, has_image)
    whole, bos = "".join(prompt + answer for prompt, answer in rounds), _bos(tokenizer)
    ids = bos + _encode_pieces(whole, encode)
    labels = [IGNORE_INDEX] * len(ids)
    for answer in _find_answers(ids, len(bos), rounds, end, None if is_plain else end_id, encode):
        labels[answer] = [IGNORE_INDEX if token == IMAGE_TOKEN_INDEX else token for token in ids[answer]]
    _check_ids(ids, len(bos), whole, own, control, tokenizer)
    return EncodedConversation(ids, labels)


def _find_answers(
    ids: list[int], start: int, rounds: list[tuple[str, str]], end: str, end_id: int | None, encode: Encode
) -> Iterator[slice]:
    """Yields where in the ids of a conversation, of which `start` are BOS, each answer lies, its end included.

    Args:
        ids: of all rounds as one text.
        start: where the first prompt begins.
        rounds: the (prompt, answer) of each.
        end: what every answer ends with, as it is written.
        end_id: the token that this is; None where the last answer goes to the end of the ids.
        encode: what made the ids.

    Raises:
        ConversationError: the tokens at the border of a prompt and its answer belong to both.
    """
    for number, (prompt, _) in enumerate(rounds):
        # The prompt as it is tokenised in its place: after the end token of the answer before it.
        prompt_ids = _encode_pieces(end + prompt, encode)[1:] if number else _encode_pieces(prompt, encode)
        answer = start + len(prompt_ids)
        stop = len(ids) if end_id is None else _find_end(ids, answer, end_id)
        if ids[start:answer] != prompt_ids or answer == stop:
            raise ConversationError(
                f"tokenization mismatch in answer {number + 1} of {len(rounds)}: the tokenizer joins its beginning "
                "with the prompt of the template; use another template or tokenizer, or leave the record out"
            )
        yield slice(answer, stop)
        start = stop


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of a text with `IMAGE_TOKEN_INDEX` for each `<image>`, and BOS if the tokenizer adds one."""
    return _bos(tokenizer) + _encode_pieces(text, lambda piece: _encode(piece, tokenizer))


@lru_cache(maxsize=8)
def control_tokens(tokenizer: Tokenizer, own: tuple[str, ...]) -> dict[str, int]:
    """Returns the tokens that no text may become, with their ids: the tokenizer's special ones and a template's."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = {*special, *cast(list[str], tokenizer.all_special_tokens), *own} - {IMAGE_TOKEN, ""}
    return {name: cast(int, tokenizer.convert_tokens_to_ids(name)) for name in sorted(names, key=len, reverse=True)}


@lru_cache(maxsize=8)
def plain_encoder(tokenizer: Tokenizer, own: tuple[str, ...]) -> Encode:
    """Returns an encoding to which special tokens are plain text, but for those of `own` that are written `_marked`.

    Raises:
        ValueError: the tokenizer is a slow one.
    """
    if not tokenizer.is_fast:
        raise ValueError("data.special_tokens=plain needs a fast tokenizer, such as `make import-hf` writes")
    fast = cast("PreTrainedTokenizerFast", tokenizer)
    backend = type(fast.backend_tokenizer).from_str(fast.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    known, ids = fast.added_tokens_decoder, {}
    for token in own:
        number = cast(int, fast.convert_tokens_to_ids(token))
        spaces = {"lstrip": known[number].lstrip, "rstrip": known[number].rstrip} if number in known else {}
        backend.add_tokens([AddedToken(_marked(token), normalized=False, **spaces)])
        ids[backend.token_to_id(_marked(token))] = number
    return lambda text: [ids.get(token, token) for token in backend.encode(text, add_special_tokens=False).ids]


def end_of_answer(template: str, tokenizer: Tokenizer) -> str:
    """Returns the text that ends an answer: generation stops at its token.

    Raises:
        UsageError: the template is unknown.
        ValueError: a special token of the template is not one token of the tokenizer.
    """
    form = _find(template)
    if form is PLAIN:
        return "\n"
    end = form.end or cast(str | None, tokenizer.eos_token)
    if end is None:
        raise ValueError(f"template {template!r} ends answers with EOS, which the tokenizer lacks; set its eos_token")
    for token in (end, *form.special_tokens):
        if _encode(token, tokenizer) != [tokenizer.convert_tokens_to_ids(token)]:
            raise ValueError(
                f"template {template!r} needs {token!r} as one token, but the tokenizer splits it; "
                f"add it to the tokenizer as a special token, or use a template made for this tokenizer"
            )
    return end


def chat_template(name: str) -> str:
    """Returns a Jinja template for `tokenizer.chat_template` that writes prompts as training has them.

    Its messages have the roles user and assistant (and system, first, where the template has one); their content is a
    text that may contain `<image>`, or a list of `{"type": "image"}` (or "image_url") and `{"type": "text", "text":
    ...}`, which is the same as the text of its parts written one after the other, `<image>` for each image; a part of
    another type raises. BOS is left to the tokenizer.

    Raises:
        UsageError: the template is unknown.
    """
    form = _find(name)
    if form is PLAIN:
        user, assistant = "'<image>' * text_of(message).count('<image>')", "text_of(message) + '\\n'"
    else:
        text = "(text_of(message) | trim)" if form.strip else "text_of(message)"
        end = "eos_token" if form.end is None else json.dumps(form.end)
        user = f"{json.dumps(form.user[0])} + {text} + {json.dumps(form.user[1])}"
        assistant = f"{json.dumps(form.header + form.gap)} + {text} + {end}"
    system = f"raise_exception('template {name} has no system turn')"
    if form.system is not None:
        system = f"{json.dumps(form.system[0])} + {text} + {json.dumps(form.system[1])}"
    substitutes = {
        "USER": user,
        "ASSISTANT": assistant,
        "SYSTEM": system,
        "DEFAULT": json.dumps(form.default_system),
        "HEADER": json.dumps(form.header),
    }
    lines = _JINJA
    for key, value in substitutes.items():
        lines = lines.replace(f"@{key}@", value)
    return lines


def chat_templates() -> list[str]:
    """Returns every chat template that this version writes."""
    return [chat_template(name) for name in TEMPLATES]


_JINJA = """\
{%- macro text_of(message) -%}
  {%- set whole = namespace(text='') -%}
  {%- if message.content is string -%}
    {%- set whole.text = message.content -%}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.type == 'text' -%}
        {%- set whole.text = whole.text + part.text -%}
      {%- elif part.type in ('image', 'image_url') -%}
        {%- set whole.text = whole.text + '<image>' -%}
      {%- else -%}
        {{- raise_exception('a part of type ' ~ part.type ~ '; this model reads parts of type text and image') -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if whole.text.count('<image>') == 1 -%}
    {{- ('<image>\\n' + (whole.text.replace('<image>', '') | trim)) | trim -}}
  {%- else -%}
    {{- whole.text -}}
  {%- endif -%}
{%- endmacro -%}
{%- set has_system = messages and messages[0].role == 'system' -%}
{%- if not has_system -%}{{- @DEFAULT@ -}}{%- endif -%}
{%- for message in messages -%}
  {%- set is_question = (loop.index0 % 2 == 1) if has_system else (loop.index0 % 2 == 0) -%}
  {%- if loop.first and has_system -%}
    {{- @SYSTEM@ -}}
  {%- elif message.role == 'user' and is_question -%}
    {{- @USER@ -}}
  {%- elif message.role == 'assistant' and not is_question -%}
    {{- @ASSISTANT@ -}}
  {%- else -%}
    {{- raise_exception('user and assistant must take turns, user first') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- @HEADER@ -}}{%- endif -%}
"""


def _find(template: str) -> Template:
    if template not in TEMPLATES:
        raise UsageError(f"template {template!r} is unknown; use one of {', '.join(TEMPLATES)}")
    return TEMPLATES[template]


def _rounds(conversations: list[dict], form: Template, end: str, has_image: bool) -> list[tuple[str, str]]:
    """Returns the (prompt, answer) of each round; the first prompt holds the system text, each answer its end."""
    begin, turns = form.default_system, list(conversations)
    if turns and turns[0]["from"] == "system":
        if form.system is None:
            raise ConversationError(
                "a system turn, which this template cannot write; use template v1, llama_3 or chatml"
            )
        begin, turns = form.system[0] + _text(turns[0], form, False) + form.system[1], turns[1:]
    elif turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    _check_roles(turns)
    separator = form.user[1] + form.header + form.gap
    rounds = []
    for human, gpt in zip(turns[::2], turns[1::2], strict=True):
        prompt = form.user[0] + _text(human, form, has_image) + form.user[1] + form.header
        answer = form.gap + _text(gpt, form, has_image) + end
        whole, expected = prompt + answer, len(prompt) + len(form.gap) - len(separator)
        if whole.find(separator) != expected or whole.count(separator) != 1:
            raise ConversationError(f"tokenization mismatch: a turn contains {separator!r}, which opens an answer")
        rounds.append((begin + prompt, answer))
        begin = ""
    return rounds


def _plain_round(conversations: list[dict], has_image: bool) -> list[tuple[str, str]]:
    if len(conversations) != 2:
        raise ConversationError(
            f"{count_text(len(conversations), 'turn')}; template 'plain' takes one question and one caption"
        )
    _check_roles(conversations)
    question, caption = (_place_image(turn["value"], has_image) for turn in conversations)
    if IMAGE_TOKEN not in question:
        raise ConversationError(f"no {IMAGE_TOKEN} in the human turn; template 'plain' is for captions of images")
    return [(IMAGE_TOKEN * question.count(IMAGE_TOKEN), caption + "\n")]


def _check_roles(turns: list[dict]) -> None:
    roles = [turn["from"] for turn in turns]
    if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
        shown = ", ".join(map(str, roles[:6])) + (", ..." if len(roles) > 6 else "")
        raise ConversationError(f"human and gpt must take turns, gpt last; found {shown or 'no turn'}")


def _text(turn: dict, form: Template, has_image: bool) -> str:
    """Returns the text of a turn as it stands in the template."""
    text = _place_image(turn["value"], has_image)
    text = text.strip() if form.strip else text
    if not text:
        raise ConversationError(f"an empty {turn['from']} turn")
    for marker in form.markers:
        if marker in text:
            raise ConversationError(f"tokenization mismatch: a {turn['from']} turn contains {marker!r}")
    return text


def _place_image(text: str, has_image: bool) -> str:
    if IMAGE_TOKEN in text and not has_image:
        raise ConversationError(f"{IMAGE_TOKEN} in the text but no image in the record")
    if text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def _find_end(ids: list[int], start: int, end_id: int) -> int:
    """Returns the index behind the first end token at or after `start`, or `start` where there is none."""
    return ids.index(end_id, start) + 1 if end_id in ids[start:] else start


def _bos(tokenizer: Tokenizer) -> list[int]:
    added = tokenizer("").input_ids
    if added not in ([], [tokenizer.bos_token_id]):
        raise ValueError(f"the tokenizer adds the ids {added} to a text, BOS alone may be; set add_eos_token=False")
    return added


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _encode_pieces(text: str, encode: Encode) -> list[int]:
    first, *rest = text.split(IMAGE_TOKEN)
    ids = list(encode(first))
    for piece in rest:
        ids += [IMAGE_TOKEN_INDEX, *encode(piece)]
    return ids


def _spells_special_token(turns: list[dict], control: dict[str, int], special_tokens: SpecialTokens) -> bool:
    """Returns whether some turn spells a special token, where that is plain text.

    Raises:
        ConversationError: One does where that is refused, or holds what marks the template's own.
    """
    if any(PRIVATE in turn["value"] for turn in turns):
        raise ConversationError(f"a turn contains {PRIVATE!r}, which is no character")
    pattern = "|".join(map(re.escape, control))
    spelled = next((found[0] for turn in turns if (found := re.search(pattern, turn["value"])) and pattern), None)
    if spelled is not None and special_tokens == "refuse":
        wrong = f"a turn contains {spelled!r}, a special token; data.special_tokens=plain keeps its row"
        raise ConversationError(wrong)
    return spelled is not None


def _check_ids(
    ids: list[int], num_bos: int, whole: str, own: tuple[str, ...], control: dict[str, int], tokenizer: Tokenizer
) -> None:
    """Makes sure that ids say what the text does: all of it, and no special token but BOS and the template's `own`."""
    unknown = cast(int | None, tokenizer.unk_token_id)
    if own and unknown in ids and unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        raise ConversationError(f"text that the tokenizer can only write as {tokenizer.unk_token!r}")
    special = set(control.values()) - {unknown}
    if sum(token in special for token in ids[num_bos:]) != sum(whole.count(token) for token in set(own)):
        raise ConversationError("the tokenizer makes a special token of some of its words")


def _marked(token: str) -> str:
    return PRIVATE + token + PRIVATE


def _marked_form(form: Template, own: tuple[str, ...]) -> Template:
    """Returns a template whose own special tokens are marked as such."""

    def mark(text: str) -> str:
        for token in own:
            text = text.replace(token, _marked(token))
        return text

    system = form.system and (mark(form.system[0]), mark(form.system[1]))
    user, default = (mark(form.user[0]), mark(form.user[1])), mark(form.default_system)
    return replace(form, user=user, header=mark(form.header), system=system, default_system=default)
