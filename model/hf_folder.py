"""Writes a Hugging Face folder: what `make import-hf` and `make export` leave behind.

    config.json, generation_config.json, chat_template.jinja      what the model is and how to ask it
    model-0000x-of-0000n.safetensors, model.safetensors.index.json
    tokenizer and processor files
    configuration_saisa.py, modeling_saisa.py, ...                the code: the folder needs no repository beside it

A *base* lacks the projectors (training starts from it), an *export* has one for every layer, and a row for the image
token in embedding and head: whatever looks ids up finds it. Everything is written to
`<folder>.part` and takes its name at the end, so a folder that exists is complete. Tensors come as an iterator and
leave in shards, so that no model is ever whole in memory.
"""

import copy
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from common.console import count_text
from common.files import named_errors
from model.hf.configuration_saisa import SaisaConfig
from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf.processing_saisa import IMAGE_TOKEN, SaisaProcessor
from model.hf.vision_saisa import stored_name
from model.hf_shards import EMBEDDING, HEAD, MAX_SHARD_BYTES, whole_folder, write_json, write_weights

CODE = Path(__file__).parent / "hf"
AUTO_MAP = {
    "AutoConfig": "configuration_saisa.SaisaConfig",
    "AutoModel": "modeling_saisa.SaisaForConditionalGeneration",  # what lmms-eval asks for
    "AutoModelForCausalLM": "modeling_saisa.SaisaForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_saisa.SaisaForConditionalGeneration",
    "AutoProcessor": "processing_saisa.SaisaProcessor",
    "AutoImageProcessor": "image_processing_saisa.SaisaImageProcessor",
}
PROJECTOR = ".mm_projector."


def write_hf_folder(
    folder: Path,
    config: SaisaConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Any,
    image_processor: Any,
    chat_template: str | None = None,
    *,
    is_base: bool = False,
    stop_token: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a complete folder, or none.

    Args:
        folder: must not exist, or be empty.
        tensors: every weight by its Hugging Face name, in any order; taken one at a time. The vocabulary has the rows
            of the configuration.
        tokenizer: with `<image>` added (`add_image_token`).
        image_processor: a `SaisaImageProcessor`.
        chat_template: Jinja template that writes prompts as training does.
        is_base: without projectors.
        stop_token: token that ends an answer besides the tokenizer's EOS, such as `<|eot_id|>`; the EOS of an export.
        dtype: to store weights in; None keeps each tensor's own.
        max_shard_bytes: bytes held in memory before a file is written.

    Raises:
        ValueError: the folder is not empty; weights are missing, unknown, twice there, or of another shape.
        OSError: a file could not be written; nothing is left.
    """
    if not is_base:
        config, tensors = add_image_row(config, tensors)
    with whole_folder(folder) as part:
        stored_dtype = write_weights(part, weight_shapes(config, is_base), tensors, dtype, max_shard_bytes)
        with named_errors(part):
            _write_config(part, config, tokenizer, stop_token, stored_dtype)
            if not is_base:
                tokenizer = ending_at(tokenizer, stop_token)
            _write_processor(part, SaisaProcessor(image_processor, tokenizer, config.num_image_tokens, chat_template))
            for file in sorted(CODE.glob("*_saisa.py")):
                shutil.copyfile(file, part / file.name)


def weight_shapes(config: SaisaConfig, is_base: bool) -> dict[str, torch.Size]:
    """Returns the shape of every weight of a folder, by name."""
    with torch.device("meta"):
        state = SaisaForConditionalGeneration(copy.deepcopy(config)).state_dict()
    if config.tie_word_embeddings:
        del state[HEAD]
    return {stored_name(name): tensor.shape for name, tensor in state.items() if not (is_base and PROJECTOR in name)}


def add_image_row(
    config: SaisaConfig, tensors: Iterable[tuple[str, Tensor]]
) -> tuple[SaisaConfig, Iterable[tuple[str, Tensor]]]:
    """Returns the configuration and the weights with a row for the image token, if they have none.

    Weights that come from an export have it already, and keep theirs.

    The row says nothing: the model puts visual tokens in its place and never lets it be said. In the embedding it is
    all ones, unlike any that is learned, so that placeholders are known by it; in the head it is zero.
    """
    num_rows = config.vocab_size - config.num_image_rows
    if (num_missing := config.image_token_id + 1 - num_rows) <= 0:
        return config, tensors

    def filled() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if name in (EMBEDDING, HEAD) and tensor.shape[0] == num_rows:
                row = tensor.new_full((num_missing, *tensor.shape[1:]), float(name == EMBEDDING))
                yield name, torch.cat([tensor, row])
            else:
                yield name, tensor

    config = copy.deepcopy(config)
    config.vocab_size, config.num_image_rows = num_rows + num_missing, num_missing
    return config, filled()


def add_image_token(tokenizer: Any, vocab_size: int) -> int:
    """Returns the id of `<image>`, added to the tokenizer if need be. In the embedding it has an unused row, or none.

    Raises:
        ValueError: the tokenizer has tokens that the model cannot embed.
    """
    known = len(tokenizer) - int(IMAGE_TOKEN in tokenizer.get_vocab())
    if known > vocab_size:
        raise ValueError(
            f"the tokenizer knows {count_text(known, 'token')} but the language model embeds only {vocab_size}; "
            "use the tokenizer that the language model was trained with"
        )
    replace_others = False  # by position: transformers 4 and 5 have other names for it
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_others)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def ending_at(tokenizer: Any, stop_token: str | None) -> Any:
    """Returns the tokenizer with the token that ends answers as its EOS: some tools stop there only (lmms-eval)."""
    if stop_token is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.eos_token = stop_token
    return tokenizer


def generation_config(config: SaisaConfig, tokenizer: Any, stop_token: str | None) -> GenerationConfig:
    """Returns how a model generates: it ends where the language model did, at the tokenizer's EOS, and at `stop_token`.

    The image token is never said.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [tokenizer.eos_token_id, *ends]
    if stop_token is not None:
        ends.append(tokenizer.convert_tokens_to_ids(stop_token))
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=sorted({end for end in ends if end is not None}),
        pad_token_id=config.pad_token_id,
        # Ours never says it anyway; told here, what drafts tokens (prompt lookup) looks for others in time.
        suppress_tokens=[config.image_token_id] if config.image_token_id < config.vocab_size else None,
    )


def _write_config(part: Path, config: SaisaConfig, tokenizer: Any, stop_token: str | None, dtype: torch.dtype) -> None:
    config = copy.deepcopy(config)
    config.architectures = ["SaisaForConditionalGeneration"]
    config.auto_map = {name: AUTO_MAP[name] for name in AUTO_MAP if name != "AutoImageProcessor"}
    config.dtype = dtype
    config.save_pretrained(part)
    generation_config(config, tokenizer, stop_token).save_pretrained(part)


def _write_processor(part: Path, processor: SaisaProcessor) -> None:
    processor.save_pretrained(part)
    processor.image_processor.save_pretrained(part)  # transformers 5 would have it inside the processor's file alone
    for file in ("processor_config.json", "preprocessor_config.json"):
        stored = json.loads((part / file).read_text())
        stored.pop("image_processor", None)
        stored["auto_map"] = {name: AUTO_MAP[name] for name in ("AutoProcessor", "AutoImageProcessor")}
        write_json(part / file, stored)
    file = part / "tokenizer_config.json"
    write_json(file, tokenizer_settings(json.loads(file.read_text())))


def tokenizer_settings(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a tokenizer in the words of transformers 4.57, which 5 reads too, and not the other way.

    It fills up on the left: `generate` goes on from the last position, for a pipeline or the tokenizer alone as well.
    """
    settings = stored | {"padding_side": "left"}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings
