"""The GPU benchmark compares what it says it compares; its passes run on the CPU too, where their times say nothing."""

import pytest
import torch
import yaml

from benchmarks import gpu
from model.config import ComputeConfig, ModelConfig
from model.flops import training_flops

FP32, CPU = ComputeConfig(precision="fp32"), torch.device("cpu")
TINY = ModelConfig.model_validate(yaml.safe_load((gpu.MODELS / "saisa-tiny.yaml").read_text()))
VICUNA = ModelConfig.model_validate(yaml.safe_load((gpu.MODELS / "saisa-vicuna-7b.yaml").read_text()))


def test_images_divide_the_text_evenly():
    pack = gpu.even_pack(2, 5, 2, 3)
    assert pack.positions_T.tolist() == [0, 4, 5, 9, 10] * 2  # t I I I t t I I I t t
    assert pack.visual_positions_I.tolist() == [1, 2, 3, 6, 7, 8] * 2
    assert pack.num_targets == 10


def test_a_layers_flops_are_those_of_the_model():
    pack = gpu.even_pack(8, 256, 1, 576)
    model = VICUNA.model_copy(update={"num_layers": 4})
    one, two = (training_flops(VICUNA.model_copy(update={"num_layers": n}), "finetune", 256, 576, 0) for n in (1, 2))
    assert gpu.pass_flops(model, pack) == 8 * (two - one)
    llava = gpu.pass_flops(model.model_copy(update={"architecture": "llava"}), pack)
    d, f = 4096, 11008
    assert llava == 8 * 3 * (2 * 832 * (4 * d * d + 3 * d * f) + 2 * 2 * 832 * 832 * d)


def test_every_comparison_runs(megatron):
    sizes = (2, 16, 1)
    figures = gpu.compare_with_llava(TINY, FP32, sizes, CPU, rounds=1)
    assert [figure.unit for figure in figures] == ["", "", "TFLOP/s", "TFLOP/s"]
    assert all(figure.value > 0 for figure in figures)
    assert gpu.compare_kernels(TINY, torch.float32, sizes, CPU, rounds=1) == []  # nothing but dense masks here
    assert gpu.compare_precisions(TINY, sizes, CPU, rounds=1) == []
    assert gpu.compare_norms(TINY, 32, CPU, rounds=1) == []
    computes = {"none": FP32, "full": FP32.model_copy(update={"recompute": "full"})}
    names = [figure.what for figure in gpu.utilization(TINY, computes, sizes, CPU, rounds=1, peak=1.0)]
    assert len(names) == 8 and any("finetune, full: MFU" in name for name in names)


def test_passes_take_turns():
    order: list[str] = []
    seconds = gpu.time_together({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, rounds=2)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    assert "".join(order[2 * gpu.WARM_UP - 2 :]) == "abbaab"


def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="bench-gpu needs a CUDA GPU"):
        gpu.main()


def test_the_machine_is_named():
    assert gpu.machine()["torch"] == torch.__version__.split("+")[0] or gpu.machine()["torch"] == torch.__version__
