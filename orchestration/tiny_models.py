"""A tiny language model and vision encoder with random weights, and the base made of them.

`build_tiny_llm` and `build_tiny_clip` write ordinary Hugging Face folders, so a tiny base takes the same road as
Vicuna and CLIP: `model.import_hf` merges them, both stages train on them, `make export` writes them out.

The vision encoder stays random: SAISA never trains it. That works because a random map keeps what is in a picture as
long as its parts have the same size. Transformers' own initialisation does not: it makes patches and positions about
0.02, which the first LayerNorm turns into features that hardly tell one place from another. Here a patch, its position
and what the layer adds are each of order one, so colour and place can be read off a feature with a linear map
(tests/orchestration/test_tiny_base.py does).
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from common.files import named_errors
from model.hf.configuration_saisa import SaisaConfig
from model.hf_read import load_tokenizer
from model.import_hf import compose_base
from pipeline.data.templates import TEMPLATES, chat_template

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
"""With ids 0, 1, 2."""
PHRASES = (TEMPLATES["v1"].default_system.strip(), "USER:", "ASSISTANT:")
VOCAB_SIZE = 512


def build_tiny_base(texts: Iterable[str], out: Path, *, tokenizer: Path | None = None, seed: int = 0) -> SaisaConfig:
    """Writes a base folder for `configs/models/saisa-tiny.yaml` to `out` and returns its configuration.

    Args:
        texts: What a tokenizer is trained on, if none is given.
        out: Folder to write; must not exist or be empty.
        tokenizer: Folder of a tokenizer; the model's vocabulary is as large as it.
        seed: For the weights.
    """
    words = load_tokenizer(tokenizer) if tokenizer else train_tokenizer(texts, PHRASES)
    with tempfile.TemporaryDirectory() as parts:
        llm, vision = Path(parts, "llm"), Path(parts, "vision")
        with named_errors(Path(parts)):
            build_tiny_llm(words, llm, vocab_size=len(words) if tokenizer else VOCAB_SIZE, seed=seed)
            build_tiny_clip(vision, seed=seed)
        return compose_base(llm, vision, out, chat_template=chat_template("v1"))


def build_tiny_llm(
    tokenizer: PreTrainedTokenizerBase,
    out_dir: Path,
    *,
    vocab_size: int = VOCAB_SIZE,
    hidden_size: int = 128,
    intermediate_size: int = 320,
    num_layers: int = 4,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    max_positions: int = 1024,
    seed: int = 0,
) -> None:
    """Writes a random Llama and its tokenizer to `out_dir`.

    Args:
        tokenizer: Stored beside the model.
        out_dir: Folder to write.
        vocab_size: Rows of the model's embedding, at least as many as the tokenizer has tokens.
        hidden_size: Model width.
        intermediate_size: FFN width.
        num_layers: Transformer layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key/value heads.
        max_positions: Most positions, visual and text.
        seed: For the weights.
    """
    ids: Any = tokenizer
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=max_positions,
        bos_token_id=ids.bos_token_id,
        eos_token_id=ids.eos_token_id,
        pad_token_id=ids.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        init_matrices(model)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


@torch.no_grad()
def init_matrices(model: LlamaForCausalLM) -> None:
    """Draws matrices that keep the size of what they read.

    At this width the usual 0.02 would leave the residual stream to the embeddings for the first hundreds of steps.
    """
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=0.02 if "embed" in name or "lm_head" in name else weight.shape[1] ** -0.5)


def train_tokenizer(
    texts: Iterable[str], phrases: tuple[str, ...] = (), vocab_size: int = VOCAB_SIZE
) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer that adds BOS.

    Each of `phrases`, such as the system sentence of a template, becomes one token.

    A merge never crosses a space, so the pieces of a prompt encode the same alone as inside it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(phrases),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # pyright: ignore[reportCallIssue]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def build_tiny_clip(
    out_dir: Path,
    *,
    image_size: int = 64,
    patch_size: int = 8,
    hidden_size: int = 128,
    num_layers: int = 2,
    seed: int = 0,
) -> None:
    """Writes a random CLIP vision tower and its image processor to `out_dir`.

    With two layers, the penultimate hidden state is the output of the first.
    """
    config = CLIPVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden_size // 32),
        projection_dim=hidden_size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = CLIPVisionModel(config)
        init_informative(tower)
    tower.save_pretrained(out_dir)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=size).save_pretrained(out_dir)


@torch.no_grad()
def init_informative(tower: CLIPVisionModel) -> None:
    """Draws weights such that the features keep what each patch shows and where it is.

    Normalised pixels are of order one, so an orthogonal patch map (every direction it keeps, it keeps at full length)
    scaled by 1 / sqrt(values per channel) gives features of order one; positions are drawn at that size. The two
    branches of a layer add at most about half of that: they blend in the rest of the picture and bend the features
    without covering them.
    """
    vision: Any = getattr(tower, "vision_model", tower)  # transformers 4 or 5
    embeddings = vision.embeddings
    patch = embeddings.patch_embedding.weight
    values_per_channel = patch[0, 0].numel()
    flat = torch.empty(patch.shape[0], patch[0].numel())
    nn.init.orthogonal_(flat)
    patch.copy_(flat.view_as(patch) * (flat.shape[1] / values_per_channel) ** 0.5)
    nn.init.normal_(embeddings.position_embedding.weight, std=1.0)
    nn.init.normal_(embeddings.class_embedding, std=1.0)
    for name, weight in vision.encoder.named_parameters():
        if weight.ndim == 2:
            branch_end = name.endswith(("out_proj.weight", "fc2.weight"))
            nn.init.normal_(weight, std=(0.5 if branch_end else 1.0) * weight.shape[1] ** -0.5)
