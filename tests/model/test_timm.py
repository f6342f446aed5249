"""Encoders of timm: their features are those of timm's own layers, from folders of timm and of open_clip."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from common.files import write_whole
from model.config import VisionConfig, model_config_from_hf
from model.hf.configuration_saisa import SaisaConfig, TimmVisionConfig
from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf.timm_saisa import TimmTower, build_trunk
from model.hf.vision_saisa import FrozenLinear
from model.hf_folder import write_hf_folder
from model.hf_read import load_config, load_image_processor, load_tokenizer
from model.import_hf import compose_base
from model.vision import flops_per_image, load_vision_tower
from model.weights import read_safetensors
from tests.hf_compat.make_folder import random_projectors
from tests.hf_compat.tiny import save_llm

timm: Any = pytest.importorskip("timm", reason="needs timm: pip install timm")
MEAN, STD = [0.5, 0.25, 0.125], [0.5, 0.5, 0.25]
# Pixels
CONVOLUTIONAL = {"test_convnext": 64, "test_resnet": 96}
SIZES = CONVOLUTIONAL | {"test_vit": 160}


def save_encoder(folder: Path, name: str, is_open_clip: bool = False) -> nn.Module:
    """Returns a random encoder with its classifier, saved as timm or open_clip does."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():  # statistics of batches too, which are no parameters
            tensor.copy_(1 + 0.1 * torch.rand_like(tensor) if tensor.ndim == 1 else 0.1 * torch.randn_like(tensor))
    folder.mkdir()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if is_open_clip:
        vision = {"timm_model_name": name, "image_size": SIZES[name]}
        config = {"model_cfg": {"vision_cfg": vision}, "preprocess_cfg": {"mean": MEAN, "std": STD}}
        write_whole(folder / "open_clip_config.json", json.dumps(config).encode())
        text = {"text.token_embedding.weight": torch.zeros(2, 2), "logit_scale": torch.zeros(1)}
        state = {f"visual.trunk.{name}": tensor for name, tensor in state.items()}
        save_file(state | text, folder / "open_clip_model.safetensors")
    else:
        images = {"input_size": [3, SIZES[name], SIZES[name]], "mean": MEAN, "std": STD, "interpolation": "bilinear"}
        config = {"architecture": name, "num_classes": 1000, "pretrained_cfg": images}
        write_whole(folder / "config.json", json.dumps(config).encode())
        save_file(state, folder / "model.safetensors")
    return model.eval()


def own_features(model: Any, pixels: Tensor) -> Tensor:
    """Returns what timm's own layers make of pixels [N, 3, H, W], as rows [N, P, C]."""
    if hasattr(model, "blocks"):  # a transformer: the penultimate block, without the class token
        x = model.norm_pre(model._pos_embed(model.patch_embed(pixels)))
        for block in model.blocks[:-1]:
            x = block(x)
        return x[:, model.num_prefix_tokens :]
    if hasattr(model, "stages"):
        x = model.stages(model.stem(pixels))
    else:
        x = model.maxpool(model.act1(model.bn1(model.conv1(pixels))))
        x = model.layer4(model.layer3(model.layer2(model.layer1(x))))
    return torch.stack([x[:, :, row, column] for row in range(x.shape[2]) for column in range(x.shape[3])], dim=1)


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llm") / "llm"
    save_llm(folder, "llama_3")
    return folder


@pytest.mark.parametrize(
    ("name", "is_open_clip"),
    [("test_resnet", False), ("test_convnext", True)]
    + [pytest.param(name, False, marks=pytest.mark.slow) for name in ("test_convnext", "test_vit")],
    ids=str,
)
def test_features_are_those_of_timms_own_layers(name, is_open_clip, llm, tmp_path):
    model = save_encoder(tmp_path / "encoder", name, is_open_clip)
    config = compose_base(llm, tmp_path / "encoder", tmp_path / "base")
    side = SIZES[name]
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = own_features(model, pixels)
        tower = load_vision_tower(tmp_path / "base", torch.float32, torch.device("cpu"))
        found = tower.train()(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, nn.Linear) for module in tower.modules()), "LoRA would adapt them"
    vision = model_config_from_hf(load_config(tmp_path / "base")).vision
    assert (vision.type, vision.num_tokens, vision.hidden_size) == ("timm", *expected.shape[1:])
    assert vision.select_layer == (-1 if name in CONVOLUTIONAL else -2)
    assert config.num_image_tokens == vision.num_tokens
    assert flops_per_image(tmp_path / "base", vision) == flops_by_hand(tower, pixels[:1])
    processor = load_image_processor(tmp_path / "base")
    assert (processor.image_mean, processor.image_std, processor.output_size) == (MEAN, STD, (side, side))
    assert processor.resample == (3 if is_open_clip else 2)


@pytest.mark.slow
def test_a_convolutional_encoder_takes_larger_images_and_another_layer(llm, tmp_path):
    model: Any = save_encoder(tmp_path / "encoder", "test_convnext")
    compose_base(llm, tmp_path / "encoder", tmp_path / "base", image_size=128, vision_select_layer=-2)
    tower = load_vision_tower(tmp_path / "base", torch.float32, torch.device("cpu"))
    pixels = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        expected = model.stages[:-1](model.stem(pixels)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(tower(pixels), expected, rtol=1e-5, atol=1e-5)
    assert not any(name.startswith("trunk.stages.3") for name in tower.state_dict()), "layers that never run"


def flops_by_hand(tower: Any, pixels: Tensor) -> int:
    """Returns those of every convolution and linear layer that runs, and of attention's two products."""
    products = []

    def add(layer: Any, _: Any, result: Tensor) -> None:
        products.append(2 * layer.weight[0].numel() * result.numel())

    for module in tower.modules():
        if isinstance(module, FrozenLinear | nn.Conv2d):
            module.register_forward_hook(add)
    tower(pixels)
    if blocks := getattr(tower.trunk, "blocks", []):
        num_rows = (pixels.shape[-1] // 16) ** 2 + 1
        products.append(len(blocks) * 2 * 2 * num_rows**2 * tower.trunk.embed_dim)
    return sum(products)


def test_an_export_says_the_same_after_loading(llm, tmp_path):
    """With statistics of batches, which are no parameters; training mode leaves them alone."""
    save_encoder(tmp_path / "encoder", "test_resnet")
    config = compose_base(llm, tmp_path / "encoder", tmp_path / "base")
    tensors = [*read_safetensors(tmp_path / "base", lambda name: True), *random_projectors(config)]

    processor = load_image_processor(tmp_path / "base")
    write_hf_folder(tmp_path / "out", config, tensors, load_tokenizer(tmp_path / "base"), processor)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    tower = load_vision_tower(tmp_path / "base", torch.float32, torch.device("cpu"))
    pixels = torch.randn(2, 3, 96, 96)
    assert torch.equal(model.model.vision_tower(pixels), tower(pixels))
    model.train()
    assert torch.equal(model.model.vision_tower(pixels), tower(pixels))
    ids = torch.tensor([[1, *[config.image_token_id] * config.num_image_tokens * 2, 5, 6]])
    logits = model.eval()(input_ids=ids, pixel_values=pixels).logits
    model.save_pretrained(tmp_path / "again")
    again = SaisaForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(input_ids=ids, pixel_values=pixels).logits, logits)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_224", {"image_size": 96}, "224 takes no images of 96 pixels .*; use its own size"),
        ("test_resnet", {"vision_select_layer": 9}, "select_layer=9 is none of the 5 layers of timm's test_resnet"),
        ("test_resnet", {"vision_select_layer": 0}, "select_layer=0 is none of the 5 layers of timm's test_resnet"),
        ("test_resnet", {"image_size": 5000}, "image_size=5000 must be of 1 to 4096 pixels"),
        ("swin_tiny_patch4_window7_224", {}, "computes tables .* that no file holds; use another encoder"),
        ("hf-hub:somebody/something", {}, "has no architecture 'hf-hub:somebody/something'"),
        ("local-dir:/tmp", {}, "has no architecture 'local-dir:/tmp'"),
    ],
)
def test_what_no_export_can_hold_is_refused(name, options, message, llm, tmp_path):
    (tmp_path / "encoder").mkdir()
    config = {"architecture": name, "pretrained_cfg": {"input_size": [3, SIZES.get(name, 224), SIZES.get(name, 224)]}}
    write_whole(tmp_path / "encoder" / "config.json", json.dumps(config).encode())
    with pytest.raises(ValueError, match=message) as told:
        compose_base(llm, tmp_path / "encoder", tmp_path / "base", **options)
    assert "\n" not in str(told.value) and not (tmp_path / "base").exists()


def test_without_timm_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="is timm's convnext_atto, and timm is not here: pip install timm$"):
        build_trunk("convnext_atto")


@pytest.mark.slow
def test_convnext_xxl_at_1024_pixels_has_1024_tokens():
    """Of the paper's table 5; on tensors without values."""
    config = SaisaConfig(vision_config=TimmVisionConfig(), vision_select_layer=-1)
    with torch.device("meta"):
        tower = TimmTower(config.vision_config, -1)
        assert tower(torch.zeros(1, 3, 1024, 1024)).shape == (1, 1024, 3072) == (1, config.num_image_tokens, 3072)
    assert 840e6 < sum(parameter.numel() for parameter in tower.parameters()) < 850e6
    vision = VisionConfig(type="timm", hidden_size=3072, num_layers=4, image_size=1024, patch_size=32, select_layer=-1)
    assert vision.num_tokens == 1024
    with pytest.raises(ValueError, match="what it costs is counted in a base folder"):
        _ = vision.usual_ffn_hidden_size
