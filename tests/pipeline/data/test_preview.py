"""The preview shows what the model is trained on: the words, which of them are targets, and the images."""

import base64
import io
import re

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from common.console import command
from pipeline.data.batches import RankCoordinates, build_source, load_table, open_shards
from pipeline.data.preview import main
from pipeline.data.preview_page import describe, page
from tests.world import CONFIGS


def run_cli(world, tmp_path, *arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(command(main))
    config = ["--config", CONFIGS / "demo-stage2.yaml", *world.overrides(tmp_path, init__projector="base")]
    result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, *config)])
    return result.exit_code, result.output


def sources(config, num_ranks: int):
    sets = open_shards(config)
    table = load_table(config, sets, Console(quiet=True))
    return [build_source(config, sets, table, RankCoordinates(rank, num_ranks)) for rank in range(num_ranks)]


def test_targets_are_the_answers_of_the_records(stage2):
    seen = 0
    for source in sources(stage2, 2):
        for name, spans, images in describe(source, 1):
            number = int(name.partition("sample ")[2].partition(" of")[0])
            record = source.samples.locate(number)[0].record(number)
            answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
            eos = str(source.tokenizer.eos_token)
            targets = [words.removesuffix(eos).strip() for kind, words in spans if kind == "target"]
            assert targets[:-1] == answers[: len(targets) - 1] and answers[len(targets) - 1].startswith(targets[-1])
            assert len(images) == len(record["images"]) == sum(kind == "image" for kind, _ in spans)
            assert record["conversations"][0]["value"].replace("<image>", "").strip() in "".join(w for _, w in spans)
            seen += 1
    assert seen == stage2.train.global_batch_size


def test_the_page_holds_the_pixels_of_the_batch(stage2):
    (source,) = sources(stage2, 1)
    html = page([source], 0)
    drawn = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", html)]
    pixels = [image for micro_batch in source[0].micro_batches for image in micro_batch.pixels_B3HW.permute(0, 2, 3, 1)]
    for data, expected in zip(drawn, pixels, strict=True):
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(np.asarray(image), expected.numpy())
    assert "://" not in html and "default-src 'none'" in html


def test_the_command_prints_every_rank_or_one(world, tmp_path):
    status, said = run_cli(world, tmp_path, "--step", 2, "--ranks", 3)
    assert status == 0 and said.startswith("step 2 (epoch 0): 8 samples, 0 skipped")
    assert [f"rank {rank}, pack 1 of" in said for rank in range(3)] == [True] * 3
    status, said = run_cli(world, tmp_path, "--ranks", 3, "--rank", 1)
    assert status == 0 and "rank 1, pack" in said and "rank 0, pack" not in said


def test_a_step_or_rank_that_is_not_there(world, tmp_path):
    assert run_cli(world, tmp_path, "--step", 6)[0] == 2
    assert run_cli(world, tmp_path, "--ranks", 2, "--rank", 2)[0] == 2
