"""Makes a base folder from a language model and a vision encoder, or an export from a LLaVA or a SAISA of others.

python -m pipeline.import_hf --llm vicuna-7b-v1.5 --vision clip-vit-large-patch14-336 --template v1 --out bases/vicuna
python -m pipeline.import_hf --llm Qwen2-0.5B-Instruct --vision siglip-base-patch16-224 --out bases/qwen2
python -m pipeline.import_hf --release llava-1.5-7b-hf --out exports/llava
"""

from pathlib import Path
from typing import Annotated, Any, get_args

from typer import Option

from common.console import UsageError, count_text, run
from model.config import ProjectorKind
from model.hf_check import check_new_folder
from pipeline.data.templates import TEMPLATES, chat_template, end_of_answer

DTYPES = ("float32", "float16", "bfloat16")
PROJECTORS = get_args(ProjectorKind)


def main(
    out: Annotated[Path, Option(help="folder to write; must not exist or be empty")],
    vision: Annotated[
        Path | None,
        Option(help="folder of a CLIP or SigLIP encoder, or one of timm or open_clip; a llava-hf folder has its own"),
    ] = None,
    llm: Annotated[Path | None, Option(help="folder of a Llama, Vicuna, Llama-3, Mistral or Qwen2 model")] = None,
    release: Annotated[
        Path | None, Option(help="folder of a LLaVA-1.5 (its own layout or llava-hf's), or of the authors' SAISA")
    ] = None,
    template: Annotated[
        str | None,
        Option(help=f"conversation template: {', '.join(TEMPLATES)}; default: that of the model's own chat template"),
    ] = None,
    projector: Annotated[str, Option(help=f"{', '.join(PROJECTORS)} (--llm)")] = "mlp",
    select_layer: Annotated[
        int | None, Option(help="hidden state of the encoder that projectors read (--llm); default: -2, -1 of ConvNeXt")
    ] = None,
    image_size: Annotated[int | None, Option(help="pixels, if not those an encoder of timm was trained with")] = None,
    image_aspect_ratio: Annotated[str, Option(help="pad or square (--llm)")] = "pad",
    max_positions: Annotated[int | None, Option(help="use the language model up to so many positions only")] = None,
    dtype: Annotated[
        str | None, Option(help="store weights as float32, float16 or bfloat16; default: as they are")
    ] = None,
) -> None:
    """Writes a folder that `make train` can start from (both), and `make chat` can talk to (--release)."""
    if (llm is None) == (release is None):
        raise UsageError("give either --llm (a language model to start from) or --release (a checkpoint to convert)")
    if llm is not None and vision is None:
        raise UsageError("--llm needs --vision, the folder of a CLIP or SigLIP encoder")
    if release is not None and (projector, select_layer, image_size, image_aspect_ratio) != ("mlp", None, None, "pad"):
        names = "--projector, --select-layer, --image-size and --image-aspect-ratio"
        raise UsageError(f"{names} go with --llm; a release has its own")
    for name, value, allowed in (
        ("--projector", projector, PROJECTORS),
        ("--image-aspect-ratio", image_aspect_ratio, ("pad", "square")),
        ("--dtype", dtype or "float32", DTYPES),
    ):
        if value not in allowed:
            raise UsageError(f"{name} {value!r} must be one of {', '.join(allowed)}")
    if template not in (None, *TEMPLATES):
        raise UsageError(f"--template {template!r} must be one of {', '.join(TEMPLATES)}")
    check_new_folder(out)
    # These take seconds: not before the options are known to be right
    import torch

    from model.hf_source import load_tokenizer
    from model.import_hf import compose_base, convert_release
    from pipeline.data.template_choice import choose_template

    source = llm or release
    assert source is not None
    tokenizer = load_tokenizer(source)
    template = template or choose_template(source, tokenizer)
    options: dict[str, Any] = {
        "chat_template": chat_template(template),
        "stop_token": None if template == "plain" else end_of_answer(template, tokenizer),
        "max_positions": max_positions,
        "dtype": getattr(torch, dtype) if dtype else None,
    }
    if llm is not None and vision is not None:
        config = compose_base(
            llm, vision, out,
            projector_type=projector, vision_select_layer=select_layer, image_size=image_size,
            image_aspect_ratio=image_aspect_ratio, **options,
        )  # fmt: skip
    else:
        config = convert_release(source, vision, out, **options)
    kind = "a base" if release is None else f"architecture {config.architecture}"
    print(
        f"{out}: {kind}, {count_text(config.num_hidden_layers, 'layer')} of width {config.hidden_size}, "
        f"{count_text(config.num_image_tokens, 'visual token')} an image ({config.vision_config.model_type}), "
        f"template {template}{ends_with(options['stop_token'])}, "
        f"at most {count_text(config.max_position_embeddings, 'position')}"
    )


def ends_with(stop_token: str | None) -> str:
    """Returns what is said of the token that ends answers."""
    return "" if stop_token is None else f" (answers end with {stop_token})"


if __name__ == "__main__":
    run(main)
