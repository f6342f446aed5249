"""Downloaded checkpoints in, folders of ours out: same logits, same tokens, and a refusal for what would differ."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedModel

from model.hf.configuration_saisa import SaisaConfig
from model.hf.image_processing_saisa import SaisaImageProcessor
from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf.processing_saisa import SaisaProcessor
from model.hf_folder import PROJECTOR, tokenizer_settings, weight_shapes, write_hf_folder
from model.hf_source import load_tokenizer, read_checkpoint
from model.import_hf import compose_base, convert_release
from pipeline.data.templates import encode_text
from tests.hf_compat.make_folder import random_projectors
from tests.hf_compat.tiny import save_llm, save_sentencepiece, save_vision
from tests.transformers_versions import MAJOR, encoder_inside

TEXT = "What is the colour of the square?"


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, PreTrainedModel]]:
    """Returns a folder and its model by kind, made once."""
    root, made = tmp_path_factory.mktemp("sources"), {}

    def get(kind: str) -> tuple[Path, PreTrainedModel]:
        if kind not in made:
            save = save_vision if kind.startswith(("clip", "siglip")) else save_llm
            made[kind] = root / kind, save(root / kind, kind)
        return made[kind]

    return get


@pytest.fixture
def llm(source: Any, tmp_path: Path) -> Path:
    """A language model folder that a test may spoil."""
    return Path(shutil.copytree(source("llama")[0], tmp_path / "llm"))


@pytest.fixture
def vision(source: Any, tmp_path: Path) -> Path:
    """An encoder folder that a test may spoil."""
    return Path(shutil.copytree(source("clip")[0], tmp_path / "vision"))


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("kind", "encoder"),
    [("llama", "clip"), ("mistral", "siglip"), ("qwen2", "clip_vision_model"), ("llama_3", "siglip")],
)
def test_text_only_logits_are_the_language_models(source: Any, tmp_path: Path, kind: str, encoder: str) -> None:
    (folder, original), (tower_folder, tower) = source(kind), source(encoder)
    config = compose_base(folder, tower_folder, tmp_path / "base")
    assert (config.attention_bias, config.tie_word_embeddings) == (kind == "qwen2", kind == "qwen2")
    model = SaisaForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    ids = torch.randint(3, 370, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(ids).logits, original(ids).logits
    if (image := config.image_token_id) < config.vocab_size:  # nobody may say it
        assert torch.equal(ours[..., image], torch.full_like(theirs[..., image], -1e4))
        ours[..., image] = theirs[..., image]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # fp32, the same operations; worst seen 0
    weights = stored(tmp_path / "base")
    assert set(weights) == set(weight_shapes(config, is_base=True))
    assert not any(PROJECTOR in name for name in weights)
    for name, tensor in encoder_inside(tower).state_dict().items():
        assert torch.equal(weights[f"model.vision_tower.vision_model.{name}"], tensor), name


def test_shards_and_old_bin_files_read_the_same(source: Any, llm: Path, vision: Path, tmp_path: Path) -> None:
    _, original = source("llama")
    (llm / "model.safetensors").unlink()
    state = original.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    names = list(state)
    shards = {"pytorch_model-1.bin": names[:5], "pytorch_model-2.bin": names[5:]}
    for file, part in shards.items():
        torch.save(
            {name: state[name] for name in part}, llm / file, _use_new_zipfile_serialization=file.endswith("1.bin")
        )
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (llm / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    compose_base(llm, vision, tmp_path / "base")
    weights = stored(tmp_path / "base")
    for name, tensor in original.state_dict().items():
        assert torch.equal(weights[name], tensor), name

    (llm / "pytorch_model-2.bin").unlink()
    with pytest.raises(ValueError, match=r"files that are not there: pytorch_model-2.bin"):
        compose_base(llm, vision, tmp_path / "other")


def test_settings_reach_the_folder(source: Any, tmp_path: Path) -> None:
    out = tmp_path / "base"
    compose_base(
        source("llama_3")[0], source("siglip")[0], out,
        chat_template="{{ messages }}", stop_token="<|eot_id|>", projector_type="linear", vision_select_layer=-1,
        image_aspect_ratio="square", max_positions=128, dtype=torch.bfloat16,
    )  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    shown = {
        "projector_type": "linear",
        "vision_select_layer": -1,
        "max_position_embeddings": 128,
        "rope_theta": 500000.0,
    }
    assert config.items() >= (shown | {"dtype": "bfloat16", "model_type": "saisa"}).items()
    assert {tensor.dtype for tensor in stored(out).values()} == {torch.bfloat16}
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 3], "EOS, and the end of a turn"
    assert generation["suppress_tokens"] == [config["image_token_id"]], "its row of the embedding is never trained"
    processor = SaisaProcessor.from_pretrained(out)
    assert processor.image_processor.image_aspect_ratio == "square"
    assert processor.chat_template == "{{ messages }}"
    assert processor.num_image_tokens == 4


def test_answers_end_where_the_language_model_does(llm: Path, vision: Path, tmp_path: Path) -> None:
    """Its generation configuration says where; an EOS of the tokenizer that is none of these ends nothing."""
    change(llm / "generation_config.json", eos_token_id=[7, 9])
    assert load_tokenizer(llm).eos_token_id == 7
    compose_base(llm, vision, tmp_path / "base")
    assert AutoTokenizer.from_pretrained(tmp_path / "base").eos_token_id == 7, "training's end of answers"
    assert json.loads((tmp_path / "base" / "generation_config.json").read_text())["eos_token_id"] == [7, 9]
    change(llm / "generation_config.json", eos_token_id=[7, 2])
    assert load_tokenizer(llm).eos_token_id == 2, "the tokenizer's own is one of them"


def test_image_token_is_never_a_row_of_the_vocabulary(source: Any, tmp_path: Path) -> None:
    for kind, expected in (("llama", 384), ("qwen2", 376)):  # 384 rows: all used by llama, 376 by qwen2
        config = compose_base(source(kind)[0], source("clip")[0], tmp_path / kind)
        if MAJOR > 4:  # a class of its own for Qwen2 adds a token
            expected = len(AutoTokenizer.from_pretrained(source(kind)[0]))
        assert config.image_token_id == expected
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert tokenizer.convert_tokens_to_ids("<image>") == expected
        assert "<image>" not in AutoTokenizer.from_pretrained(source(kind)[0]).get_vocab()


@pytest.mark.parametrize(("kind", "num_added"), [("llama", 1), ("qwen2", 0)])
def test_an_export_has_a_row_for_the_image_token(source: Any, tmp_path: Path, kind: str, num_added: int) -> None:
    config = compose_base(source(kind)[0], source("clip")[0], tmp_path / "base")
    processor = SaisaProcessor.from_pretrained(tmp_path / "base")
    tensors = [*read_checkpoint(tmp_path / "base"), *random_projectors(config)]
    write_hf_folder(tmp_path / "out", config, tensors, processor.tokenizer, processor.image_processor)
    base, out = stored(tmp_path / "base"), stored(tmp_path / "out")
    ones = torch.ones(num_added, config.hidden_size)
    assert torch.equal(out["model.embed_tokens.weight"], torch.cat([base["model.embed_tokens.weight"], ones]))
    assert ("lm_head.weight" in out) == (kind == "llama")
    if kind == "llama":
        assert torch.equal(out["lm_head.weight"], torch.cat([base["lm_head.weight"], 0 * ones]))
    assert SaisaConfig.from_pretrained(tmp_path / "out").vocab_size == 384 + num_added
    assert SaisaConfig.from_pretrained(tmp_path / "base").vocab_size == config.vocab_size == 384, "training's own"
    # An export is a base as well; then its row stays the only one.
    write_hf_folder(
        tmp_path / "again", SaisaConfig.from_pretrained(tmp_path / "out"), read_checkpoint(tmp_path / "out"),
        processor.tokenizer, processor.image_processor,
    )  # fmt: skip
    assert all(torch.equal(tensor, out[name]) for name, tensor in stored(tmp_path / "again").items())


def llava_ids(text: str, tokenizer: Any) -> list[int | None]:
    """LLaVA's `tokenizer_image_token`: pieces between `<image>` (None here), the BOS of all but the first dropped."""
    ids: list[int | None] = []
    for number, piece in enumerate(text.split("<image>")):
        piece_ids = tokenizer(piece).input_ids
        has_bos = bool(piece_ids) and piece_ids[0] == tokenizer.bos_token_id
        ids += ([None] if number else []) + piece_ids[1 if number and has_bos else 0 :]
    return ids


@pytest.mark.parametrize("kind", ["llama", "qwen2", "llama_3"])
def test_processor_tokenises_as_training_does(source: Any, tmp_path: Path, kind: str) -> None:
    compose_base(source(kind)[0], source("clip")[0], tmp_path / "base")
    processor = SaisaProcessor.from_pretrained(tmp_path / "base")
    image = processor.image_token_id
    original = AutoTokenizer.from_pretrained(source(kind)[0])
    texts = ["<image>\n" + TEXT, TEXT, "How  <image> many <image><image>shapes?\n<image>", "a</s>b <s>c", ""]
    picture = Image.new("RGB", (40, 30), "red")
    for text in texts:
        expected = [x for i in llava_ids(text, original) for x in ([image] * 4 if i is None else [i])]
        found = processor(text=text, images=[picture] * text.count("<image>"))["input_ids"]
        assert found == [expected], text
    inputs = processor(text=texts, images=[picture] * 5, padding=True, return_tensors="pt")
    assert inputs["pixel_values"].shape == (5, 3, 28, 28)
    assert inputs["attention_mask"][1].sum() == len(processor.tokenize(TEXT))
    assert inputs["attention_mask"][1, -1] == 1 and inputs["attention_mask"][1, 0] == 0, "padded on the left"


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image> x", None, "1 <image>, but there are 0 images"),
        (["<image> x", "y"], [[], ["i"]], r"have \[1, 0\] <image> each, but the lists of images have \[0, 1\]"),
    ],
)
def test_processor_counts_images(source: Any, tmp_path: Path, text: Any, images: Any, message: str) -> None:
    compose_base(source("llama")[0], source("clip")[0], tmp_path / "base")
    processor = SaisaProcessor.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=images)
    with pytest.raises(TypeError, match="does not know the option truncation"):
        processor(text="x", truncation=True)


@pytest.mark.parametrize("settings", [{"legacy": True}, {"legacy": False}, {"add_prefix_space": None}])
def test_the_tokenizer_becomes_one_that_every_version_reads_alike(tmp_path: Path, settings: dict[str, Any]) -> None:
    save_sentencepiece(tmp_path / "source", **settings)
    original = AutoTokenizer.from_pretrained(tmp_path / "source")
    load_tokenizer(tmp_path / "source").save_pretrained(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        # LlamaTokenizer would be built anew by transformers 5, which calls the plain class by another name
        "PreTrainedTokenizerFast" if MAJOR == 4 else "TokenizersBackend"
    )
    copied = AutoTokenizer.from_pretrained(tmp_path / "copy")
    for text in (TEXT, "  two spaces", "", "\nline", "red</s>blue <s> x", "caf\u00e9 \U0001f642"):
        if text.startswith(" ") and settings.get("legacy") is False:
            continue  # the converted tokenizer is wrong here: test_a_sentencepiece_model_gives_the_slow_tokenizers_ids
        assert copied(text).input_ids == original(text).input_ids
        ids = original(text).input_ids
        assert copied.decode(ids, skip_special_tokens=True) == original.decode(ids, skip_special_tokens=True)


def test_a_folder_says_what_transformers_4_57_reads_too(source: Any, tmp_path: Path) -> None:
    """Whichever of the two has written it: 5 calls the plain class and the list of special tokens by other names."""
    compose_base(source("llama")[0], source("clip")[0], tmp_path / "base")
    file = tmp_path / "base" / "tokenizer_config.json"
    stored = json.loads(file.read_text())
    assert stored["tokenizer_class"] == "PreTrainedTokenizerFast" and stored["padding_side"] == "left"
    assert stored["additional_special_tokens"] == ["<image>"] and not stored.get("extra_special_tokens")
    before = AutoTokenizer.from_pretrained(tmp_path / "base")
    # Source: what transformers 5.23 writes of such a tokenizer.
    tokens = {name: stored[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    of_5 = {"backend": "tokenizers", "extra_special_tokens": ["<image>"], "is_local": True, **tokens}
    file.write_text(json.dumps(tokenizer_settings(of_5 | {"tokenizer_class": "TokenizersBackend"})))
    after = AutoTokenizer.from_pretrained(tmp_path / "base")
    ids = after("a <image> b</s>").input_ids
    assert ids == before("a <image> b</s>").input_ids
    assert after.decode(ids, skip_special_tokens=True) == before.decode(ids, skip_special_tokens=True)
    assert "<image>" in after.all_special_tokens and "<image>" not in after.decode(ids, skip_special_tokens=True)


def test_real_mistral_tokenizer(realdata: Path) -> None:
    original = AutoTokenizer.from_pretrained(realdata / "tokenizers" / "mistral_v1_hf")
    copied = load_tokenizer(realdata / "tokenizers" / "mistral_v1_hf")
    rows = json.loads((realdata / "coco_photos" / "llava_instruct.json").read_text())[:20]
    texts = [turn["value"] for row in rows for turn in row["conversations"]]
    assert copied(texts).input_ids == original(texts).input_ids


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"model_type": "gpt2"}, "model_type='gpt2' is not supported; use one of llama, mistral, qwen2"),
    "rope": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling 'llama3' is not supported"),
    "rope5": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope scaling 'yarn' is not supported"),
    "quantised": ({"quantization_config": {"bits": 4}}, "the checkpoint is quantised"),
    "bias": ({"attention_bias": True}, "attention_bias=True is not supported"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
    "window": (
        {"model_type": "mistral", "sliding_window": 64},
        "sliding_window=64 is shorter .* pass --max-positions 64",
    ),
    "shape": ({"hidden_size": 64}, r"lm_head.weight has shape \[384, 32\]; the configuration says \[384, 64\]"),
    "layers": ({"num_hidden_layers": 4}, "9 of .* weights missing: model.layers.3.input_layernorm.weight"),
    "fewer": ({"num_hidden_layers": 2}, "model.layers.2.* is not a weight of this model"),
    "vocabulary": ({"vocab_size": 300}, "the tokenizer knows 384 tokens but the language model embeds only 300"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_language_models_that_cannot_be_represented(llm: Path, vision: Path, tmp_path: Path, case: str) -> None:
    changes, message = REFUSALS[case]
    change(llm / "config.json", **changes)
    with pytest.raises(ValueError, match=message) as error:
        compose_base(llm, vision, tmp_path / "base")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llm", "vision"], "nothing half-written stays"


def test_a_sliding_window_that_never_slides_is_fine(llm: Path, vision: Path, tmp_path: Path) -> None:
    change(llm / "config.json", model_type="mistral", sliding_window=64)
    assert compose_base(llm, vision, tmp_path / "base", max_positions=64).max_position_embeddings == 64


def test_rope_theta_of_transformers_5(llm: Path, vision: Path, tmp_path: Path) -> None:
    change(llm / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 250000.0})
    assert compose_base(llm, vision, tmp_path / "base").rope_theta == 250000.0


def test_encoders_that_do_not_fit(llm: Path, vision: Path, tmp_path: Path) -> None:
    change(vision / "preprocessor_config.json", crop_size={"height": 24, "width": 24})
    with pytest.raises(ValueError, match=r"images of 24 x 24 pixels, config.json says image_size=28"):
        compose_base(llm, vision, tmp_path / "base")
    (vision / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"preprocessor_config.json: no such file"):
        compose_base(llm, vision, tmp_path / "base")
    change(vision / "config.json", model_type="dinov2")
    with pytest.raises(ValueError, match="model_type='dinov2' is not supported; use a CLIP or SigLIP encoder"):
        compose_base(llm, vision, tmp_path / "base")


def test_missing_and_quantised_tensors(llm: Path, vision: Path, tmp_path: Path) -> None:
    weights = load_file(llm / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, llm / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 of \d+ weights missing: model.norm.weight"):
        compose_base(llm, vision, tmp_path / "base")
    weights["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    save_file(weights, llm / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight is stored as torch.int8; quantised"):
        compose_base(llm, vision, tmp_path / "base")


def test_an_existing_folder_is_not_touched(llm: Path, vision: Path, tmp_path: Path) -> None:
    out = tmp_path / "base"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(ValueError, match="exists and is not empty; choose another folder"):
        compose_base(llm, vision, out)
    assert [path.name for path in out.iterdir()] == ["precious"]


def as_release(export: Path, release: Path, with_encoder: bool) -> None:
    """Writes an export in the authors' layout: LLaVA's configuration, a nested tower, LLaVA's unused projector."""
    config = json.loads((export / "config.json").read_text())
    tower, nested = "model.vision_tower.", "model.vision_tower.vision_tower."
    weights = {
        name.replace(tower, nested): tensor
        for name, tensor in stored(export).items()
        if with_encoder or tower not in name
    }
    weights["model.mm_projector.0.weight"] = torch.zeros(32, 16)
    release.mkdir()
    save_file(weights, release / "model.safetensors")
    kept = {name: value for name, value in config.items() if name not in ("auto_map", "vision_config", "model_type")}
    mm = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "image_aspect_ratio": "pad"}
    (release / "config.json").write_text(json.dumps(kept | {"model_type": "llava_llama", "hidden_act": "silu"} | mm))


@pytest.mark.parametrize("with_encoder", [True, False])
def test_the_authors_layout(source: Any, tmp_path: Path, with_encoder: bool) -> None:
    llm, vision = source("llama")[0], source("clip")[0]
    config = compose_base(llm, vision, tmp_path / "base")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from read_checkpoint(tmp_path / "base")
        yield from random_projectors(config)

    processor = SaisaProcessor.from_pretrained(tmp_path / "base")
    export = tmp_path / "export"
    write_hf_folder(export, config, tensors(), processor.tokenizer, processor.image_processor, max_shard_bytes=50_000)
    assert len(list(export.glob("*.safetensors"))) > 2
    as_release(export, tmp_path / "release", with_encoder)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(llm / file, tmp_path / "release" / file)
    convert_release(tmp_path / "release", vision, tmp_path / "converted")
    expected, found = stored(export), stored(tmp_path / "converted")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    change(tmp_path / "release" / "config.json", mm_vision_select_feature="cls_patch")
    with pytest.raises(ValueError, match="mm_vision_select_feature='cls_patch' must be 'patch'"):
        convert_release(tmp_path / "release", vision, tmp_path / "other")


def test_one_projector_in_every_layer_is_stored_for_each(source: Any, tmp_path: Path) -> None:
    config = compose_base(source("llama")[0], source("clip")[0], tmp_path / "base")
    processor = SaisaProcessor.from_pretrained(tmp_path / "base")
    shared = {name.split(PROJECTOR)[1]: tensor for name, tensor in random_projectors(config) if ".0.mm_" in name}
    copies = [(f"model.layers.{i}{PROJECTOR}{name}", tensor) for i in range(3) for name, tensor in shared.items()]
    tensors = [*read_checkpoint(tmp_path / "base"), *copies]
    write_hf_folder(tmp_path / "export", config, tensors, processor.tokenizer, processor.image_processor)
    weights = stored(tmp_path / "export")
    assert torch.equal(weights["model.layers.2.mm_projector.0.weight"], shared["0.weight"])
    with pytest.raises(ValueError, match=r"comes twice"):
        write_hf_folder(tmp_path / "twice", config, [*tensors, *copies], processor.tokenizer, processor.image_processor)
    with pytest.raises(ValueError, match=r"12 of \d+ weights missing: model.layers.0.mm_projector.0.weight"):
        write_hf_folder(
            tmp_path / "none",
            config,
            read_checkpoint(tmp_path / "base"),
            processor.tokenizer,
            processor.image_processor,
        )


NASTY = [
    "", "a", " a", "  a", "   ", "\n", "\n a", " \n a", "a ", "a  b", " and ", "\u2581a", "\u2581", " \u2581 a", "\ta",
    "\u00a0a", "\u3000a", " .", ".", "'s", " 's", "\u65e5\u672c", "\U0001f642 x", " \U0001f642", "e\u0301", "\u200b a",
    "\ufeffa", " 1 2", "1", " -1", "\r\n", "\x00a", "fi \ufb01 \u00bd \u2460", "A" * 50, " " * 20, " \u2581",
]  # fmt: skip
SPECIAL = ["</s> a", " </s>a", "a </s>  b", "</s>", "  </s>", "<s>a", "a<unk> b"]


@pytest.mark.parametrize("legacy", [True, False])
def test_a_sentencepiece_model_gives_the_slow_tokenizers_ids(realdata: Path, tmp_path: Path, legacy: bool) -> None:
    """As LLaVA uses it: every piece between images on its own. Sentencepiece itself knows no special tokens."""
    if MAJOR > 4:
        pytest.skip("needs transformers 4: later ones have no slow tokenizers")
    model = realdata / "tokenizers" / "mistral_v1" / "tokenizer.model"
    (tmp_path / "llm").mkdir()
    shutil.copy(model, tmp_path / "llm")
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True, "unk_token": "<unk>"}
    settings |= {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "llm" / "tokenizer_config.json").write_text(json.dumps(settings))
    imported = load_tokenizer(tmp_path / "llm")
    imported.add_special_tokens({"additional_special_tokens": ["<image>"]})
    imported.save_pretrained(tmp_path / "out")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    slow, pieces = LlamaTokenizer(str(model), legacy=legacy), SentencePieceProcessor(str(model))
    for tokenizer in (imported, exported):
        processor = SaisaProcessor(SaisaImageProcessor(), tokenizer, num_image_tokens=1)
        for text in NASTY + SPECIAL:
            ids = slow(text, add_special_tokens=False).input_ids
            assert tokenizer(text, add_special_tokens=False).input_ids == ids, text
            if text in NASTY and "\u2581" not in text:
                assert ids == pieces.encode(text), text
            image = [processor.image_token_id]
            assert processor.tokenize(f"<image>{text}<image>{text}") == [1, *image, *ids, *image, *ids], text
            placeholders = [-200 if token in image else token for token in processor.tokenize(f"{text}<image>{text}")]
            assert encode_text(f"{text}<image>{text}", tokenizer) == placeholders, text
