"""LLaVA-1.5 in and out, in its own layout and in that of transformers, whose own LLaVA is the reference.

Every model here is made, or read again, by transformers itself; `make test-transformers5` runs the same on version 5.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gelu
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from model.hf.configuration_saisa import TimmVisionConfig
from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf.processing_saisa import SaisaProcessor
from model.hf_read import load_config, load_tokenizer
from model.hf_source import read_checkpoint
from model.import_hf import convert_release
from model.llava_folder import write_llava
from model.llava_hf_folder import spaced, write_llava_hf
from pipeline.data.templates import chat_template
from tests.hf_compat.tiny import SIZES, VISION, VOCAB, randomise, save_byte_level, save_sentencepiece, save_vision
from tests.model.hf_models import GREEDY, IMAGE, NUM_IMAGES, ROWS, own_pixels
from tests.transformers_versions import CLIPImageProcessor, SiglipImageProcessor, encoder_inside

ROPE: dict[str, Any] = {"rope_theta": 50000.0}


def tiny_llava(kind: str) -> LlavaForConditionalGeneration:
    """A random LLaVA of transformers; the vocabulary has rows for an image and padding that are not its last."""
    sizes: dict[str, Any] = SIZES | ROPE | {"vocab_size": VOCAB + 8, "eos_token_id": 2, "bos_token_id": 1}
    if kind == "llama-clip":
        text: Any = LlamaConfig(**sizes, rms_norm_eps=1e-5)
        vision: Any = CLIPVisionConfig(**VISION)
        chosen = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    else:
        text = Qwen2Config(**sizes, tie_word_embeddings=True)
        vision = SiglipVisionConfig(**VISION)
        chosen = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=4, **chosen)
    model = LlavaForConditionalGeneration(config)
    randomise(model)
    return model


def save_llava_hf(folder: Path, kind: str = "llama-clip") -> LlavaForConditionalGeneration:
    """Returns a tiny LLaVA, saved by transformers with tokenizer and image processor files."""
    model = tiny_llava(kind)
    model.save_pretrained(folder)
    save_sentencepiece(folder) if kind == "llama-clip" else save_byte_level(folder, adds_bos=False)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    replace_others = False
    tokenizer.add_tokens([f"<unused{number}>" for number in range(IMAGE - len(tokenizer))])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_others)
    tokenizer.save_pretrained(folder)
    edge = VISION["image_size"]
    square = {"height": edge, "width": edge}
    clip = CLIPImageProcessor(size={"shortest_edge": edge}, crop_size=square)
    (clip if kind == "llama-clip" else SiglipImageProcessor(size=square)).save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def llava_hf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, LlavaForConditionalGeneration]]:
    """Returns a llava-hf folder and its model by kind, made once."""
    made = {}

    def get(kind: str) -> tuple[Path, LlavaForConditionalGeneration]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("llava") / kind
            made[kind] = folder, save_llava_hf(folder, kind)
        return made[kind]

    return get


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rows_with_images() -> Any:
    for number, row in enumerate(ROWS):
        yield torch.tensor([row]), {"pixel_values": own_pixels(number)} if NUM_IMAGES[number] else {}


def assert_same_model(ours: Any, theirs: Any) -> None:
    """Logits at text, but for the image token's own, and what both say."""
    with torch.no_grad():
        for ids, images in rows_with_images():
            text = ids[0] != IMAGE
            found, expected = ours(ids, **images).logits[0, text], theirs(ids, **images).logits[0, text]
            width = min(found.shape[1], expected.shape[1])
            said = torch.arange(width) != IMAGE
            torch.testing.assert_close(found[:, :width][:, said], expected[:, :width][:, said], rtol=0, atol=1e-5)
            options = GREEDY | {"suppress_tokens": [IMAGE]}
            assert torch.equal(ours.generate(ids, **images, **options), theirs.generate(ids, **images, **options))


@pytest.mark.parametrize("kind", ["llama-clip", "qwen2-siglip"])
def test_llava_hf_comes_in(llava_hf: Any, tmp_path: Path, kind: str) -> None:
    folder, original = llava_hf(kind)
    config = convert_release(folder, None, tmp_path / "out")
    assert (config.architecture, config.image_token_id, config.num_image_rows) == ("llava", IMAGE, 0)
    assert (config.vision_select_layer, config.rope_theta) == (-2 if kind == "llama-clip" else -1, 50000.0)
    assert_same_model(SaisaForConditionalGeneration.from_pretrained(tmp_path / "out").eval(), original)


def test_new_and_old_names_of_llava_hf_are_read_alike(llava_hf: Any, tmp_path: Path) -> None:
    """Source: names in llava-hf/llava-1.5-7b-hf, and those of `LlavaForConditionalGeneration` in transformers 4.57."""
    folder, original = llava_hf("llama-clip")
    state = original.state_dict()
    new = {name: name for name in state}
    old = {
        name: name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
        if name != "lm_head.weight"
        else "language_model.lm_head.weight"
        for name in state
    }
    found = []
    for number, names in enumerate((new, old)):
        copy = Path(shutil.copytree(folder, tmp_path / f"in-{number}"))
        weights = {names[name]: tensor.clone() for name, tensor in state.items() if "position_ids" not in name}
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        convert_release(copy, None, tmp_path / f"out-{number}")
        found.append(stored(tmp_path / f"out-{number}"))
    assert "language_model.model.layers.0.mlp.up_proj.weight" in old.values()
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("kind", ["llama-clip", "qwen2-siglip"])
@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_llava_hf_goes_out(llava_hf: Any, tmp_path: Path, kind: str, aspect: str) -> None:
    """What was read is written again: transformers loads the same weights, pixels and tokens, without code of ours."""
    folder, original = llava_hf(kind)
    copy = Path(shutil.copytree(folder, tmp_path / "in"))
    if aspect == "pad":
        change(copy / "preprocessor_config.json", do_pad=True)
    convert_release(copy, None, tmp_path / "ours")
    export_again(tmp_path / "ours", tmp_path / "out", write_llava_hf)
    assert not list((tmp_path / "out").glob("*.py"))
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    for name, tensor in original.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert_same_model(again, original)
    processor, ours = AutoProcessor.from_pretrained(tmp_path / "out"), SaisaProcessor.from_pretrained(tmp_path / "ours")
    assert type(processor).__name__ == "LlavaProcessor"
    assert ours.image_processor.image_aspect_ratio == aspect
    noise = np.random.default_rng(0).integers(0, 256, (40, 28, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    inputs = processor(images=image, text="<image> What is red?", return_tensors="pt")
    expected = ours(images=image, text="<image> What is red?", return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE).sum() == 4
    worst = (inputs["pixel_values"] - expected["pixel_values"]).abs().max()
    assert worst < 0.05, "the same pixels, but for how versions of transformers round"
    if kind == "qwen2-siglip":
        assert torch.equal(inputs["input_ids"], expected["input_ids"])


def export_again(folder: Path, out: Path, write: Callable[..., None], **changes: Any) -> None:
    """Writes an export in another format, as `make export` does from a checkpoint."""
    processor = SaisaProcessor.from_pretrained(folder)
    config = load_config(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    write(out, config, read_checkpoint(folder), load_tokenizer(folder), processor.image_processor, "{{ messages }}")


def save_llava(folder: Path, vision: Path, brings_encoder: bool) -> tuple[Any, Any, dict[str, Tensor]]:
    """Writes LLaVA's own layout by hand. Source: liuhaotian/llava-v1.5-7b. Returns its parts."""
    llm = LlamaForCausalLM(LlamaConfig(**SIZES | ROPE, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2))
    randomise(llm).save_pretrained(folder)
    tower = save_vision(vision, "clip_vision_model")
    generator = torch.Generator().manual_seed(5)
    shapes = {"0.weight": (32, 16), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    projector = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    weights = stored(folder) | {f"model.mm_projector.{name}": tensor for name, tensor in projector.items()}
    if brings_encoder:
        inside = encoder_inside(tower).state_dict()
        weights |= {f"model.vision_tower.vision_tower.vision_model.{name}": tensor for name, tensor in inside.items()}
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    change(
        folder / "config.json",
        model_type="llava_llama", architectures=["LlavaLlamaForCausalLM"], mm_projector_type="mlp2x_gelu",
        mm_vision_tower="openai/clip-vit-large-patch14-336", mm_hidden_size=16, mm_vision_select_layer=-2,
        mm_vision_select_feature="patch", mm_use_im_start_end=False, image_aspect_ratio="pad",
    )  # fmt: skip
    save_sentencepiece(folder)
    return llm.eval(), tower.eval(), projector


def logits_of_parts(
    llm: Any, tower: Any, projector: dict[str, Tensor], ids: Tensor, images: dict[str, Tensor]
) -> Tensor:
    """What LLaVA computes: the projector's output takes the place of `<image>` among the embeddings."""
    embeddings = llm.get_input_embeddings()(ids.clamp(max=VOCAB - 1))
    if images:
        states = tower(images["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        hidden = gelu(states @ projector["0.weight"].T + projector["0.bias"])
        embeddings[ids == IMAGE] = (hidden @ projector["2.weight"].T + projector["2.bias"]).flatten(0, 1)
    return llm(inputs_embeds=embeddings).logits[0]


@pytest.mark.parametrize("brings_encoder", [True, False])
def test_llavas_own_layout_comes_in_and_goes_out(tmp_path: Path, brings_encoder: bool) -> None:
    parts = save_llava(tmp_path / "in", tmp_path / "vision", brings_encoder)
    config = convert_release(tmp_path / "in", tmp_path / "vision", tmp_path / "ours")
    assert (config.architecture, config.image_token_id, config.projector_type) == ("llava", IMAGE, "mlp")
    model = SaisaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()

    export_again(tmp_path / "ours", tmp_path / "out", write_llava)
    weights = stored(tmp_path / "out")
    before = {name: tensor for name, tensor in stored(tmp_path / "in").items() if "vision_tower" not in name}
    assert weights.keys() == before.keys() and all(torch.equal(weights[name], before[name]) for name in weights)
    read = LlamaForCausalLM.from_pretrained(tmp_path / "out", config=llama_config(tmp_path / "out")).eval()
    prefix = "model.mm_projector."
    projector = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
    tower = CLIPVisionModel.from_pretrained(tmp_path / "out" / "vision_tower").eval()
    with torch.no_grad():
        for ids, images in rows_with_images():
            text = ids[0] != IMAGE
            expected = logits_of_parts(*parts, ids, images)[text]
            found = model(ids, **images).logits[0, text, :VOCAB]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            assert torch.equal(logits_of_parts(read, tower, projector, ids, images)[text], expected)

    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("in", "out")]
    assert "<image>" not in tokenizers[1].get_vocab() and len(tokenizers[1]) == VOCAB
    assert tokenizers[1]("What is red?</s>").input_ids == tokenizers[0]("What is red?</s>").input_ids
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["mm_vision_tower"] == str(tmp_path / "out" / "vision_tower"), "where LLaVA looks for the encoder"
    settings = json.loads((tmp_path / "in" / "config.json").read_text())
    same = [name for name in settings if name.startswith(("mm_", "image_")) and name != "mm_vision_tower"]
    assert {name: told[name] for name in same} == {name: settings[name] for name in same}
    # The encoder lies inside, so nobody has to name it.
    convert_release(tmp_path / "out", None, tmp_path / "again")
    first, second = stored(tmp_path / "ours"), stored(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def llama_config(folder: Path) -> LlamaConfig:
    return LlamaConfig.from_dict(json.loads((folder / "config.json").read_text()) | {"model_type": "llama"})


def test_the_image_token_that_an_export_adds_is_never_the_likeliest(tmp_path: Path) -> None:
    save_llava(tmp_path / "in", tmp_path / "vision", brings_encoder=False)
    convert_release(tmp_path / "in", tmp_path / "vision", tmp_path / "ours")
    assert load_config(tmp_path / "ours").num_image_rows == 1
    export_again(tmp_path / "ours", tmp_path / "out", write_llava_hf)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        for ids, images in rows_with_images():
            logits = theirs(ids, **images).logits[0]
            torch.testing.assert_close(logits[:, IMAGE], logits[:, :IMAGE].mean(-1), rtol=0, atol=1e-4)
    told = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert told["suppress_tokens"] == [IMAGE]
    assert_same_model(theirs, SaisaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval())


@pytest.mark.parametrize("settings", [{"legacy": True}, {"legacy": False}])
def test_prompts_of_llava_hf_have_the_ids_of_training(llava: tuple[Path, Path], tmp_path: Path, settings: Any) -> None:
    """Where a tokenizer opens every text with a space, or only the first; images that touch, too."""
    folder = Path(shutil.copytree(llava[0], tmp_path / "in"))
    save_sentencepiece(folder, **settings)
    convert_release(folder, llava[1], tmp_path / "ours", chat_template=chat_template("v1"))
    ours = SaisaProcessor.from_pretrained(tmp_path / "ours")
    written = spaced(ours.chat_template, ours.tokenizer)
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": " and "}, {"type": "image"}]
    for content in ([{"type": "image"}, {"type": "text", "text": "What is red?"}], [*parts, parts[2]]):
        said = [{"role": "user", "content": content}, {"role": "assistant", "content": "Red."}]
        said += [{"role": "user", "content": "Sure?"}]
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        expected = [1, *ours.tokenize(ours.apply_chat_template(said, **options), False)]
        prompt = ours.tokenizer.apply_chat_template(said, chat_template=written, **options)
        found = ours.tokenizer(prompt.replace("<image>", "<image>" * ours.num_image_tokens)).input_ids
        assert found == expected


TILES = "images in tiles .LLaVA-1.6. are not supported; use a LLaVA-1.5"
NOT_LLAVA_HF: dict[str, tuple[dict[str, Any], str]] = {
    "later": (
        {"model_type": "llava_next"},
        "model_type='llava_next' is another LLaVA than 1.5.*llava-hf/llava-1.5-7b-hf",
    ),
    "language model": ({"model_type": "llama"}, "model_type='llama' is no LLaVA; give a language model as LLM="),
    "activation": ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu' must be 'gelu'"),
    "bias": ({"multimodal_projector_bias": False}, "multimodal_projector_bias='False' must be True"),
    "class token": (
        {"vision_feature_select_strategy": "full"},
        "vision_feature_select_strategy='full' is not supported with a clip_vision_model, only 'default'",
    ),
    "layers": ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer=\[-2, -5\] must be one layer"),
    "tiles": ({"image_grid_pinpoints": [[336, 672]]}, f"image_grid_pinpoints: {TILES}"),
    "image token": ({"image_token_index": 7}, "image_token_index=7, but the id of <image> in its tokenizer is 384"),
    "sections": ({"text_config": None}, "text_config and vision_config must be objects"),
    "size": ({"vision_config": VISION | {"patch_size": 7}}, r"patch_embedding.weight has shape \[16, 3, 14, 14\]"),
    "encoder": ({"vision_config": VISION | {"model_type": "pixtral"}}, "'pixtral' is not supported; use a CLIP or Sig"),
}


@pytest.mark.parametrize("case", NOT_LLAVA_HF)
def test_what_is_no_llava_hf_of_1_5_is_refused(llava_hf: Any, tmp_path: Path, case: str) -> None:
    changes, message = NOT_LLAVA_HF[case]
    folder = Path(shutil.copytree(llava_hf("llama-clip")[0], tmp_path / "in"))
    change(folder / "config.json", **changes)
    refused(message, folder, None, tmp_path / "out")


def refused(message: str, *arguments: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        convert_release(*arguments)
    assert "\n" not in str(error.value) and not arguments[-1].exists()


def test_an_encoder_beside_llava_hf_is_refused(llava_hf: Any, tmp_path: Path) -> None:
    refused(
        r"brings its own encoder; leave out VISION= \(--vision\)", llava_hf("llama-clip")[0], tmp_path, tmp_path / "o"
    )


def test_class_tokens_are_not_taken_from_an_encoder_that_has_none(llava_hf: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llava_hf("qwen2-siglip")[0], tmp_path / "in"))
    change(folder / "config.json", vision_feature_select_strategy="default")
    refused("'default' is not supported with a siglip_vision_model, only 'full'", folder, None, tmp_path / "out")


def test_settings_of_images_inside_those_of_the_processor(llava_hf: Any, tmp_path: Path) -> None:
    """As transformers 5 saves a whole processor."""
    folder = Path(shutil.copytree(llava_hf("llama-clip")[0], tmp_path / "in"))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings | {"do_pad": True}}))
    convert_release(folder, None, tmp_path / "out")
    processor = SaisaProcessor.from_pretrained(tmp_path / "out").image_processor
    assert (processor.image_aspect_ratio, processor.output_size) == ("pad", (28, 28))


NOT_LLAVA: dict[str, tuple[dict[str, Any], str]] = {
    "tiles": ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres' is not supported .LLaVA-1.6's tiles"),
    "merge": ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type='spatial_unpad' must be 'flat'"),
    "projector": (
        {"mm_projector_type": "mlp3x_gelu"},
        "mm_projector_type='mlp3x_gelu' is not supported, only mlp2x_ge",
    ),
    "class token": ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature='cls_patch' must be 'patch'"),
    "tokens": ({"mm_use_im_start_end": True}, "mm_use_im_start_end='True' must be False"),
    "width": ({"mm_hidden_size": 1024}, "mm_hidden_size=1024, but the encoder in .* has hidden_size=16; give the one"),
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of LLaVA's own layout and of its encoder."""
    root = tmp_path_factory.mktemp("own")
    save_llava(root / "in", root / "vision", brings_encoder=False)
    return root / "in", root / "vision"


@pytest.mark.parametrize("case", NOT_LLAVA)
def test_what_is_no_llava_of_1_5_is_refused(llava: tuple[Path, Path], tmp_path: Path, case: str) -> None:
    changes, message = NOT_LLAVA[case]
    folder = Path(shutil.copytree(llava[0], tmp_path / "in"))
    change(folder / "config.json", **changes)
    refused(message, folder, llava[1], tmp_path / "out")


def test_llava_without_its_encoder_or_projector_is_refused(llava: tuple[Path, Path], tmp_path: Path) -> None:
    refused(
        "names its encoder .mm_vision_tower='openai/clip-.* give the folder .* VISION=", llava[0], None, tmp_path / "o"
    )
    folder = Path(shutil.copytree(llava[0], tmp_path / "in"))
    weights = {name: tensor for name, tensor in stored(folder).items() if "mm_projector" not in name}
    save_file(weights, folder / "model.safetensors")
    refused("no mm_projector among its weights, so it cannot see", folder, llava[1], tmp_path / "o")


def test_an_encoder_that_is_not_what_it_says_is_refused(llava: tuple[Path, Path], tmp_path: Path) -> None:
    vision = Path(shutil.copytree(llava[1], tmp_path / "vision"))
    change(vision / "config.json", intermediate_size=40)
    refused(rf"{vision}: .*mlp.fc1.* has shape .* by config.json it is of shape \[40", llava[0], vision, tmp_path / "o")
    change(vision / "config.json", intermediate_size=24, num_hidden_layers=4)
    refused(rf"{vision}: 16 weights of the encoder in config.json missing", llava[0], vision, tmp_path / "o")
    change(vision / "config.json", num_hidden_layers=2)
    refused(
        rf"{vision}: vision_model.encoder.layers.2.* by config.json it is not there", llava[0], vision, tmp_path / "o"
    )


@pytest.mark.parametrize(
    ("write", "changes", "message"),
    [
        (
            write_llava_hf,
            {"architecture": "shortv", "frozen_layers": [1]},
            "FORMAT=llava-hf cannot hold .*'shortv'; export",
        ),
        (
            write_llava,
            {"architecture": "naavit"},
            "FORMAT=llava cannot hold model.architecture='naavit'; .* FORMAT=saisa",
        ),
        (write_llava_hf, {"projector_type": "linear"}, "FORMAT=llava-hf cannot hold model.projector='linear'"),
        (
            write_llava,
            {"projector_type": "resampler"},
            "FORMAT=llava cannot hold .*'resampler'; export with FORMAT=saisa",
        ),
        (
            write_llava_hf,
            {"vision_config": TimmVisionConfig()},
            "FORMAT=llava-hf cannot hold a timm_grid; export with FORMAT=saisa",
        ),
        (write_llava, {"attention_bias": True}, "FORMAT=llava cannot hold a Qwen2; export with FORMAT=llava-hf"),
        (write_llava, {"head_dim": 16}, "cannot hold attention heads of 64 in all and hidden_size=32"),
    ],
)
def test_models_that_a_format_cannot_hold(
    llava: tuple[Path, Path], tmp_path: Path, write: Callable[..., None], changes: dict[str, Any], message: str
) -> None:
    convert_release(*llava, tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        export_again(tmp_path / "ours", tmp_path / "out", write, **changes)
    assert not (tmp_path / "out").exists()
