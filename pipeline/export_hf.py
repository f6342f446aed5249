"""What `make export` does: the weights of a checkpoint and of its base become one Hugging Face folder."""

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from model.config import FAMILY, ModelConfig
from model.hf.configuration_saisa import SaisaConfig
from model.hf_folder import write_hf_folder
from model.hf_read import load_config, load_tokenizer
from model.llava_folder import check_llava, write_llava
from model.llava_hf_folder import write_llava_hf
from model.weights import Named, name_table, read_safetensors, spread_shared_projector, to_hf
from pipeline.checkpoint.checkpoint import load_trained_parameters
from pipeline.checkpoint.run_info import check_base, read_info, stored_config
from pipeline.data.templates import chat_template, end_of_answer
from pipeline.distributed import initialize_distributed, shutdown_distributed
from pipeline.start import load_image_processor

WRITERS: dict[str, Callable[..., None]] = {
    "saisa": write_hf_folder,
    "llava-hf": write_llava_hf,
    "llava": write_llava,
}


def export(checkpoint: Path, out: Path, form: str = "saisa") -> None:
    """Writes the model of a checkpoint to `out`.

    Args:
        checkpoint: Of either stage.
        out: A folder that is not there.
        form: A name in `WRITERS`.

    Raises:
        ValueError: the checkpoint or its base is not there, `out` holds something already, or the format cannot hold
            the model.
    """
    info = read_info(checkpoint)
    config = stored_config(checkpoint, info)
    if form != "saisa":
        check_llava(described(config.init.base, config.model), form)
    base, template = config.init.base, config.data.template
    check_base(checkpoint, info, base)
    initialize_distributed()
    trained = load_trained_parameters(checkpoint)
    shutdown_distributed()
    if config.phase == "pretrain":
        trained = dict(spread_shared_projector(trained, config.model))
    tokenizer = load_tokenizer(base)
    WRITERS[form](
        out,
        described(base, config.model),
        merged(base, dict(to_hf(trained.items(), name_table(config.model)))),
        tokenizer,
        load_image_processor(base, config.data.image_aspect_ratio),
        chat_template(template),
        stop_token=None if template == "plain" else end_of_answer(template, tokenizer),
    )


def described(base: Path, model: ModelConfig) -> SaisaConfig:
    """Returns the base's configuration with what the run says becomes of visual tokens."""
    config = load_config(base)
    for name in FAMILY:
        setattr(config, name, getattr(model, name))
    config.projector_type, config.resampler_tokens = model.projector, model.resampler_tokens
    return config


def merged(base: Path, trained: dict[str, Tensor]) -> Iterator[Named]:
    """Yields the trained tensors, then those of the base that were not trained."""
    yield from trained.items()
    yield from read_safetensors(base, lambda name: name not in trained)
