"""The commands of the Makefile answer `--help`, a wrong option and a missing file before they import a framework."""

import json
import re
import subprocess
import sys
from glob import glob
from typing import Any

import pytest

from tests.source_files import ROOT

STAGE1 = "--config configs/demo-stage1.yaml"
MISTAKES = {
    "benchmarks.fake_gpu": (f"{STAGE1} optim.lr=1", "unknown setting optim.lr"),
    "benchmarks.roofline": (f"{STAGE1} optim.lr=1", "unknown setting optim.lr"),
    "orchestration.compare": ("--out configs", "configs: holds files that no comparison wrote"),
    "orchestration.demo": ("--out README.md", "README.md"),
    "orchestration.ray_train": (f"{STAGE1} optim.lr=1", "unknown setting optim.lr"),
    "orchestration.submit_check": ("--none", "No such option"),
    "orchestration.tiny_base": ("--data none.json --out configs", "configs exists and is not empty"),
    "data_prep.shards": ("--data none.json --images tests --out none", "none.json: No such file"),
    "data_prep.verify": ("none", "none: no shards here"),
    "data_prep.report": ("none", "none: no shards here"),
    "pipeline.data.preview": (f"{STAGE1} optim.lr=1", "unknown setting optim.lr"),
    "pipeline.evaluation.chat": ("--model none", "none: no config.json"),
    "pipeline.evaluation.evaluate": ("--model none --data none.json --images .", "none.json: No such file"),
    "pipeline.export": ("--checkpoint none --out none --format gguf", "--format 'gguf' must be one of saisa, llava-hf"),
    "pipeline.flops_table": ("--figure README.md/figure.png", "README.md: File exists"),
    "pipeline.import_hf": ("--llm none --vision none --out none --template v2", "--template 'v2' must be one of"),
    "pipeline.shards.stream_check": ("none", "none: no shards here"),
    "pipeline.layer_contribution": ("--model none --data none.json --out none", "none.json: No such file"),
    "pipeline.train": (f"{STAGE1} optim.lr=1", "unknown setting optim.lr"),
}
"""Of each command, a mistake that people make and what is said of it."""
SAY = """
import contextlib, io, json, runpy, sys
for module, arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    sys.argv = [module, *arguments.split()]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            status = end.code
    heavy = sorted({"torch", "transformers", "megatron", "ray", "streaming", "webdataset"} & set(sys.modules))
    print(json.dumps([status, " ".join(said.getvalue().split()), heavy]))
"""


@pytest.fixture(scope="module")
def said() -> dict[tuple[str, str], tuple[int, str, list[str]]]:
    """What each command says to each line of arguments: its status, its words, the frameworks imported so far."""
    lines = [(module, line) for module, (mistake, _) in MISTAKES.items() for line in ("--help", "--none", mistake)]
    command = [sys.executable, "-W", "ignore", "-c", SAY, json.dumps(lines)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    return {line: tuple(answer) for line, answer in zip(lines, answers, strict=True)}


def test_every_command_of_the_makefile_is_here():
    started = re.findall(
        r"-m ((?:data_prep|pipeline|orchestration|benchmarks\.fake_gpu|benchmarks\.roofline)[\w.]*)",
        (ROOT / "Makefile").read_text(),
    )
    assert set(started) == set(MISTAKES)


@pytest.mark.parametrize("module", MISTAKES)
def test_a_command_answers_before_it_imports_a_framework(said, module):
    """Torch, transformers, megatron-core and ray take 5 to 20 seconds, and 800 MB."""
    mistake, expected = MISTAKES[module]
    (helped, usage, _), (refused, option, _), (failed, told, heavy) = (
        said[module, line] for line in ("--help", "--none", mistake)
    )
    assert heavy == []
    assert (helped, refused) == (0, 2) and failed in (1, 2)
    assert "Usage: " in usage and "No such option: --none" in option
    assert expected in told and "Traceback" not in told


@pytest.mark.skipif(bool(glob("/dev/nvidiactl")), reason="needs a machine without a GPU")
def test_torch_is_told_of_no_cuda_toolkit_where_there_is_no_gpu():
    """It looks for one, and warns of it, where both are unset (`_find_cuda_home` in torch/utils/cpp_extension.py)."""
    show = '--eval=show: ; @echo "home=$$CUDA_HOME,path=$$CUDA_PATH,set=$$(env | grep -c ^CUDA_)"'
    options: Any = {"env": {"PATH": "/usr/bin:/bin", "CUDA_HOME": "/usr/local/cuda"}, "capture_output": True}
    shown = subprocess.run(["make", show, "show"], cwd=ROOT, check=True, text=True, **options)
    assert shown.stdout.strip() == "home=,path=,set=2"
