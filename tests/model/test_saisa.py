"""The Megatron-core SAISA against the plain reference: losses and every gradient, in fp32."""

from dataclasses import replace

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from model.compute import build_transformer_config
from model.config import ComputeConfig, ModelConfig, VisionConfig
from model.pack import IGNORE_INDEX, Pack, rows_of_pack
from model.parallel import ParallelConfig, Stage
from model.saisa import SaisaModel
from model.weights import from_hf, load_parameters, name_table, to_hf
from tests.model.flamingo_reference import flamingo_shapes
from tests.model.packs import pack_of
from tests.model.reference import reference_logits, reference_loss

V = 4  # visual tokens an image
# fp32 against fp64, relative to the largest entry of a tensor: rounding of long sums. Worst seen: 3e-5.
TOLERANCE = 1e-4
# (text tokens before each image..., text tokens after the last): zero, one, several, adjacent and leading images
LAYOUTS = [(5,), (1, 4), (0, 3), (2, 3, 2), (0, 0, 3), (3, 0, 2, 1)]


RESAMPLER = {"projector": "resampler", "resampler_tokens": 3}  # fewer than the features of an image


def wide(width: int) -> VisionConfig:
    """An encoder whose width is that of several heads of a resampler."""
    return VisionConfig(hidden_size=width, num_layers=2, image_size=16, patch_size=8)


def tiny(**changes) -> ModelConfig:
    vision = VisionConfig(hidden_size=10, num_layers=2, image_size=16, patch_size=8)
    sizes = dict(
        num_layers=3, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, head_dim=6
    )
    return ModelConfig(**{**sizes, "vocab_size": 50, "max_positions": 64, "vision": vision, **changes})


def random_weights(model: ModelConfig) -> dict[str, Tensor]:
    """Random weights by Hugging Face name, norms away from one so that a forgotten norm shows."""
    generator = torch.Generator().manual_seed(0)
    d, h, f, c = model.hidden_size, model.head_dim, model.ffn_hidden_size, model.vision.hidden_size
    shapes = {"model.embed_tokens.weight": (model.vocab_size, d), "model.norm.weight": (d,)}
    if not model.tie_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, d)
    for i in range(model.num_layers):
        layer = f"model.layers.{i}."
        heads = {"q": model.num_attention_heads, "k": model.num_query_groups, "v": model.num_query_groups}
        for name, count in heads.items():
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (count * h, d)
            if model.qkv_bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (count * h,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (d, model.num_attention_heads * h)
        shapes |= {f"{layer}mlp.{n}_proj.weight": (f, d) for n in ("gate", "up")} | {
            f"{layer}mlp.down_proj.weight": (d, f)
        }
        shapes |= {f"{layer}input_layernorm.weight": (d,), f"{layer}post_attention_layernorm.weight": (d,)}
    owners = [f"model.layers.{i}." for i in range(0, model.num_layers, model.block_size)]
    if model.architecture == "flamingo":
        shapes |= flamingo_shapes(model)
    fronts = [] if model.cross_attention == "open_flamingo" else ["model."]
    for owner in owners if model.architecture == "saisa" else fronts:
        projector = {
            "mlp": {"0": (d, c), "2": (d, d)},
            "linear": {"": (d, c)},
            "resampler": {"1": (d, c), **{f"0.{name}": (c, c) for name in ("query", "key", "value", "output")}},
        }[model.projector]
        if model.projector == "resampler":
            shapes[f"{owner}mm_projector.0.latents"] = (model.resampler_tokens, c)
        for part, shape in projector.items():
            prefix = f"{owner}mm_projector.{part}".rstrip(".")
            shapes |= {f"{prefix}.weight": shape} | ({} if part == "0.key" else {f"{prefix}.bias": shape[:1]})
    return {name: torch.randn(shape, generator=generator) * 0.4 + (len(shape) == 1) for name, shape in shapes.items()}


def random_pack(model: ModelConfig, layouts: list[tuple[int, ...]], seed: int = 0) -> tuple[Pack, Tensor]:
    """Samples with the given layouts in one row, and their features."""
    generator = torch.Generator().manual_seed(seed)
    pack = pack_of(layouts, model.num_tokens_per_image)
    num_text = len(pack.positions_T)
    targets = torch.randint(model.vocab_size, (num_text,), generator=generator)
    targets[torch.rand(num_text, generator=generator) < 0.4] = IGNORE_INDEX
    token_ids = torch.randint(model.vocab_size, (num_text,), generator=generator)
    features = torch.randn(pack.num_images * V, model.vision.hidden_size, generator=generator)
    return replace(pack, token_ids_T=token_ids, targets_T=targets), features


def assert_equal_to_rounding(ours: Tensor, reference: Tensor, name: str = "") -> None:
    worst = (ours.double() - reference).abs().max() / reference.abs().max()
    assert worst <= TOLERANCE, f"{name}: differs by {worst:.1e} of the largest entry"


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def build(model: ModelConfig, shared_projector: bool = False) -> SaisaModel:
    config = build_transformer_config(model, ComputeConfig(precision="fp32"), ParallelConfig(), shared_projector)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return SaisaModel(model, config, groups, Stage(0, 1, range(model.num_layers)), shared_projector)


Rules = list[tuple[str, str]] | None


def reference_total(
    weights: dict[str, Tensor], model: ModelConfig, pack: Pack, features: Tensor, rules: Rules = None
) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    text = visual = image = 0
    for num_text, num_images in zip(pack.text_lengths, pack.image_counts, strict=True):
        rows, seen = slice(text, text + num_text), slice(visual, visual + num_images * V)  # features: V an image
        text, visual = rows.stop, seen.stop
        starts, image = pack.image_positions[image : image + num_images].tolist(), image + num_images
        steps = range(model.num_tokens_per_image)
        visual_positions = torch.tensor([start + i for start in starts for i in steps], dtype=torch.long)
        positions, tokens = pack.positions_T[rows], pack.token_ids_T[rows]
        visible = features[seen].double()
        logits = reference_logits(weights, model, tokens, positions, visible, visual_positions, rules=rules)
        total = total + reference_loss(logits, pack.targets_T[rows])
    return total


VARIANTS = [
    {},
    {"num_query_groups": 4},
    {"num_query_groups": 1},
    {"projector": "linear"},
    RESAMPLER,
    {"projector": "resampler", "resampler_tokens": 5, "vision": wide(128)},
    {"qkv_bias": True},
    {"tie_embeddings": True},
]


def assert_learns_as_the_reference(
    model: ModelConfig, shared: bool, pack: Pack, features: Tensor, expected: Tensor, weights: dict[str, Tensor]
) -> None:
    """The loss, and the gradient of every weight by Hugging Face name; `weights` have those of `expected`."""
    ours = build(model, shared)
    load_parameters(ours, from_hf(random_weights(model).items(), name_table(model)))
    losses = ours(pack, features)
    losses.sum().backward()

    assert losses.shape == (pack.num_targets,)
    assert_equal_to_rounding(losses.sum(), expected)
    gradients = dict(to_hf(((n, gradient(p)) for n, p in ours.named_parameters()), name_table(model)))
    assert gradients.keys() == weights.keys()
    for name, found in gradients.items():
        assert_equal_to_rounding(found, gradient(weights[name]), name)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_loss_and_gradients_equal_the_reference(changes, megatron):
    model = tiny(**changes)
    weights = {name: tensor.double().requires_grad_() for name, tensor in random_weights(model).items()}
    pack, features = random_pack(model, LAYOUTS)
    expected = reference_total(weights, model, pack, features)
    expected.backward()

    assert_learns_as_the_reference(model, False, pack, features, expected, weights)


def test_the_shared_projector_is_the_same_projector_in_every_layer(megatron):
    model = tiny()
    weights = random_weights(model)
    for name in [name for name in weights if "mm_projector" in name]:
        weights[name] = weights[name.replace(name.split(".")[2], "0", 1)]
    shared = {n: t.double().requires_grad_() for n, t in weights.items() if n.startswith("model.layers.0.mm_projector")}
    tied = {
        n: shared[n.replace(n.split(".")[2], "0", 1)] if "mm_projector" in n else t.double() for n, t in weights.items()
    }
    pack, features = random_pack(model, LAYOUTS)
    reference_total(tied, model, pack, features).backward()

    saisa = build(model, shared_projector=True)
    ours = [
        (n.replace("layers.0.projector", "shared_projector"), t) for n, t in from_hf(weights.items(), name_table(model))
    ]
    load_parameters(saisa, ours)
    saisa(pack, features).sum().backward()
    for number, part in (("0", "fc1"), ("2", "fc2")):
        for kind in ("weight", "bias"):
            parameter = saisa.get_parameter(f"shared_projector.{part}.{kind}")
            theirs = shared[f"model.layers.0.mm_projector.{number}.{kind}"]
            assert_equal_to_rounding(gradient(parameter), gradient(theirs), f"{part}.{kind}")


def test_a_resampler_keeps_the_rows_of_padding(megatron):
    model = tiny(**RESAMPLER)
    saisa = build(model)
    load_parameters(saisa, from_hf(random_weights(model).items(), name_table(model)))
    pack, features = random_pack(model, [(2, 3), (0, 2, 4)])
    expected = saisa(pack, features)
    padded = replace(
        pack,
        token_ids_T=torch.cat([pack.token_ids_T, torch.zeros(1, dtype=torch.long)]),
        positions_T=torch.cat([pack.positions_T, torch.zeros(1, dtype=torch.long)]),
        targets_T=torch.cat([pack.targets_T, torch.tensor([IGNORE_INDEX])]),
        text_lengths=[*pack.text_lengths, 1],
        image_counts=[*pack.image_counts, 0],
        num_visual_padding=7,
    )
    losses = saisa(padded, rows_of_pack(features[:, None], 7))
    torch.testing.assert_close(losses, expected)


def test_text_before_an_image_and_other_samples_do_not_see_it(megatron):
    model = tiny()
    saisa = build(model)
    load_parameters(saisa, from_hf(random_weights(model).items(), name_table(model)))
    pack, features = random_pack(model, [(2, 3), (4,)])
    before = saisa.hidden_states(pack, features)
    after = saisa.hidden_states(pack, features + 1)
    changed = (before != after).any(-1).tolist()
    assert changed == [False, False, True, True, True, False, False, False, False]


@pytest.mark.parametrize("changes", [{}, RESAMPLER], ids=str)
def test_a_pack_without_images_or_targets_keeps_every_parameter_in_the_graph(changes, megatron):
    model = tiny(**changes)
    saisa = build(model)
    load_parameters(saisa, from_hf(random_weights(model).items(), name_table(model)))
    pack, features = random_pack(model, [(3,)])
    pack.targets_T.fill_(IGNORE_INDEX)
    saisa(pack, features).sum().backward()
    assert [name for name, p in saisa.named_parameters() if p.grad is None] == []
    assert all(not p.grad.any() for p in saisa.parameters() if p.grad is not None)
