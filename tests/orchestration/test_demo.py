"""The demo, as small as it gets: every step of the story runs, and leaves what it says. No word about accuracy."""

import json
import math

import pytest
from PIL import Image

from common.console import UsageError
from orchestration.demo import main
from pipeline.metrics import read_metrics

NUM_TRAIN, NUM_TEST = 12, 2


@pytest.mark.usefixtures("local_ray")
def test_the_smallest_demo_tells_the_whole_story(tmp_path, capsys):
    out = tmp_path / "demo"
    out.mkdir()
    (out / "notes.txt").touch()
    with pytest.raises(UsageError, match="holds files that no demo wrote; use a new folder"):
        main(out)
    (out / "notes.txt").unlink()
    main(out, seed=1, num_train=NUM_TRAIN, num_test=NUM_TEST)
    told = capsys.readouterr().out
    assert [line[:3] for line in told.splitlines() if line[1:3] == "/7"] == [f"{number}/7" for number in range(1, 8)]

    stages = {
        "stage1": (64, 1, NUM_TRAIN),
        "stage2": (32, 3, len(json.loads((out / "data/finetune.json").read_text()))),
    }
    for name, (batch, num_epochs, num_rows) in stages.items():
        steps = read_metrics(out / name)
        assert len(steps) == num_epochs * -(-num_rows // batch)
        assert sum(step["num_samples"] for step in steps) == num_epochs * num_rows
        assert sum(step["num_images"] for step in steps) >= num_epochs * NUM_TRAIN // 2
        assert all(math.isfinite(step["loss"]) and step["num_skipped"] == 0 for step in steps)
    questions = json.loads((out / "data/test.json").read_text())
    num_questions = sum(len(row["conversations"]) // 2 for row in questions)
    result = json.loads((out / "result.json").read_text())
    assert result["num_questions"] == num_questions >= 4 * NUM_TEST
    assert 0 <= result["accuracy"] <= 1 and result["seconds"] > 0 and result["peak_memory_bytes"] > 1e8
    assert f"of {num_questions} questions right" in told and f"make chat MODEL={out / 'export'}" in told
    assert "<article" in (out / "examples.html").read_text() and Image.open(out / "loss.png").width > 100
    assert {"model.safetensors.index.json", "config.json"} <= {file.name for file in (out / "export").iterdir()}
