"""Transformer Engine without its compiled part: its Python runs as it is, over stand-ins for the kernels it calls.

Its Python comes from the package `transformer-engine` alone, which `make setup` lays into a folder of its own:
installed like others it would claim to be usable. Stand-ins take and give fake tensors and leave an event each; a call
that has none raises, with its name.
"""

import enum
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from benchmarks.fake_gpu import te_fp8
from benchmarks.fake_gpu.recorder import Recorder
from benchmarks.fake_gpu.te_fp8 import engine

FOLDER = Path(sys.prefix) / "transformer-engine"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
COMPILED = "transformer_engine_torch"
NOT_INSTALLED = ("transformer_engine.pytorch.onnx_extensions", "einops")
"""What Transformer Engine's Python imports and a training step does not use."""
DTYPES = dict(kByte=0, kInt32=2, kFloat32=4, kFloat16=5, kBFloat16=6, kFloat8E4M3=7, kFloat8E5M2=8, kFloat4E2M1=10)
"""Numbers of Transformer Engine's types; only that they differ matters here."""
FORWARD = ("GEMM1_INPUT", "GEMM1_WEIGHT", "GEMM1_OUTPUT", "GEMM2_INPUT", "GEMM2_WEIGHT", "GEMM2_OUTPUT", "GEMM3_OUTPUT")
BACKWARD = ("GRAD_OUTPUT1", "GRAD_INPUT1", "GRAD_OUTPUT2", "GRAD_INPUT2", "GRAD_OUTPUT3", "GRAD_INPUT3")
MANY_TENSORS = [
    "scale",
    "scale_tensor",
    "l2norm",
    "unscale_l2norm",
    "adam",
    "adam_param_remainder",
    "adam_fp8",
    "adam_capturable",
    "adam_capturable_master",
    "sgd",
    "compute_scale_and_scale_inv",
    "compute_scale_inv_e8m0",
]
ATTENTION = ("NVTE_No_Backend", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8")


class _AnyMember(type):
    """Of an enumeration whose numbers mean nothing here: whatever is asked for is a member."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return crc32(name.encode())


class _Module(ModuleType):
    """A module that is not there: enumerations, what is set on it, and an error for every other call."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            return _AnyMember(name, (), {})

        def missing(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"no stand-in for {self.__name__}.{name}; add one to {__file__}")

        return missing


def install(recorder: Recorder) -> None:
    """Makes `import transformer_engine` succeed, with stand-ins that leave their events in `recorder`.

    Raises:
        ValueError: Its Python part is not there.
    """
    check_version(FOLDER)
    sys.path.insert(0, str(FOLDER))
    compiled: Any = _Module(COMPILED)
    compiled.DType = enum.IntEnum("DType", DTYPES)
    compiled.FP8FwdTensors = enum.IntEnum("FP8FwdTensors", FORWARD, start=0)
    compiled.FP8BwdTensors = enum.IntEnum("FP8BwdTensors", BACKWARD, start=0)
    compiled.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", ATTENTION, start=-1)
    compiled.get_cublasLt_version = lambda: 130100
    compiled.get_num_cublas_streams = lambda: 4
    compiled.get_cudnn_version = lambda: 91900
    for stand_ins in (_matrix_products, te_fp8.quantization, _elementwise, _many_tensors):
        vars(compiled).update(stand_ins(recorder))
    compiled.__all__ = [name for name in vars(compiled) if not name.startswith("__")]
    sys.modules |= {name: _Module(name) for name in NOT_INSTALLED} | {COMPILED: compiled}
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no search for its libraries
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the first attempt, which looks for the compiled module's file
            common: Any = importlib.import_module("transformer_engine.common")
        common.load_framework_extension = lambda framework: None
        importlib.import_module("transformer_engine.pytorch")
        _replace_triton(recorder)
        te_fp8.let_parts_be_fake()
        vars(sys.modules["transformer_engine"])["pytorch"] = sys.modules["transformer_engine.pytorch"]
    finally:
        del os.environ["NVTE_PROJECT_BUILDING"]


def check_version(folder: Path) -> None:
    """Makes sure that a folder has the Python of the version that the stand-ins are for.

    Raises:
        ValueError: It has not.
    """
    wanted = REQUIREMENTS.read_text().split("==")[-1].strip()
    if not (folder / f"transformer_engine-{wanted}.dist-info").is_dir():
        raise ValueError(
            f"{folder}: no Python part of Transformer Engine {wanted}, which the stand-ins are for; remove it and "
            f"{folder.with_name('.ready')}, then `make setup` installs it"
        )


def forget() -> None:
    """Empties what Transformer Engine keeps for its whole process, so that another world starts as a first one does."""
    engine("quantization").FP8GlobalStateManager.reset()  # groups of processes
    engine("module.base")._dummy_wgrads.clear()  # what autograd is given for gradients that are added up already
    engine("cpp_extensions.gemm").get_cublas_workspace.cache_clear()


class _TritonKernel:
    """A kernel that Triton would compile: `kernel[grid](...)` leaves an event."""

    def __init__(self, name: str, recorder: Recorder) -> None:
        self.name, self.recorder = name, recorder

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.recorder.add(
            "kernel", f"te.{self.name}", [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        )


def _replace_triton(recorder: Recorder) -> None:
    module = importlib.import_module("transformer_engine.pytorch.triton.cross_entropy")
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        setattr(module, name, _TritonKernel(name, recorder))


def _matrix_products(recorder: Recorder) -> dict[str, Callable[..., Any]]:
    def generic_gemm(
        a: Any,
        transpose_a: bool,
        b: Any,
        transpose_b: bool,
        out: Tensor | None,
        quantizer: Any,
        out_dtype: Any,
        bias: Tensor | None,
        bias_dtype: Any,
        gelu: bool,
        gelu_in: Tensor | None,
        grad: bool,
        workspace: Tensor,
        workspace_size: int,
        accumulate: bool,
        *rest: Any,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Returns `op(b) @ op(a)` in row-major terms (cuBLAS counts columns first), and the bias gradient."""
        assert not gelu and quantizer is None, "no stand-in for a matrix product with an epilogue"
        a_size, b_size = a.size(), b.size()
        a_rows, b_rows = a_size[:-1].numel(), b_size[:-1].numel()
        num_columns, num_inner_a = (a_rows, a_size[-1]) if transpose_a else (a_size[-1], a_rows)
        num_rows, num_inner = (b_size[-1], b_rows) if transpose_b else (b_rows, b_size[-1])
        assert num_inner == num_inner_a, (a_size, transpose_a, b_size, transpose_b)
        assert a.device == b.device and a.device.type == "cuda", (a.device, b.device)
        shape = (num_rows, num_columns) if transpose_b else (*b_size[:-1], num_columns)
        a_values, b_values = te_fp8.operand(a, not transpose_a), te_fp8.operand(b, transpose_b)
        te_fp8.check_sizes(num_rows, num_columns, num_inner, a_values, b_values)
        if out is None:
            out = torch.empty(shape, dtype=_torch_dtype(out_dtype, a), device=a.device)
        assert out.numel() == num_rows * num_columns, (out.shape, shape)
        bias_grad = None
        if grad and bias is not None:
            assert b_values is b, "an 8-bit product gives no bias gradient"
            bias_grad = torch.empty(b_size[-1], dtype=bias.dtype, device=b.device)
        inputs = [x for x in (a_values, b_values, bias, out if accumulate else None) if x is not None]
        recorder.add("kernel", "te.gemm", inputs, [out], flops=2 * num_rows * num_columns * num_inner)
        return out, bias_grad, None, None

    return {"generic_gemm": generic_gemm}


def _torch_dtype(out_dtype: Any, a: Any) -> torch.dtype:
    return a.dtype if out_dtype is None else engine("constants").TE_DType_To_Torch[out_dtype]


def _elementwise(recorder: Recorder) -> dict[str, Callable[..., Any]]:
    def kernel(name: str, inputs: list[Tensor], shape: Any) -> Tensor:
        out = torch.empty(shape, dtype=inputs[0].dtype, device=inputs[0].device)
        recorder.add("kernel", f"te.{name}", inputs, [out])
        return out

    def qgelu(x: Tensor, quantizer: Any) -> Tensor:
        assert quantizer is None, "no stand-in for an activation that quantizes"
        return kernel("qgelu", [x], x.shape)

    def swiglu(x: Tensor, quantizer: Any, *_: Any) -> Tensor:
        assert quantizer is None, "no stand-in for an activation that quantizes"
        return kernel("swiglu", [x], (*x.shape[:-1], x.shape[-1] // 2))

    def dswiglu(grad: Tensor, x: Tensor, quantizer: Any, *_: Any) -> Tensor:
        assert quantizer is None, "no stand-in for an activation that quantizes"
        return kernel("dswiglu", [grad, x], x.shape)

    def rope(name: str) -> Callable[..., Tensor]:
        def work(x: Tensor, angles: Tensor, *_: Any) -> Tensor:
            assert angles.dtype == torch.float32 and angles.shape == (len(x), 1, 1, x.shape[-1]), angles.shape
            return kernel(name, [x, angles], x.shape)

        return work

    ropes = {name: rope(name) for name in ("fused_rope_forward", "fused_rope_backward")}
    return {"qgelu": qgelu, "swiglu": swiglu, "dswiglu": dswiglu, **ropes}


def _many_tensors(recorder: Recorder) -> dict[str, Callable[..., Any]]:
    """Returns what works on lists of tensors in few launches: the optimizer, the gradient norm, scaling."""

    def build(name: str) -> Callable[..., Any]:
        def work(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], *rest: Any) -> Any:
            tensors = [tensor for part in lists for tensor in part]
            assert all(tensor.is_cuda for tensor in tensors), name
            recorder.add("kernel", f"te.{name}", tensors)
            if "l2norm" in name:
                return (torch.empty(1, dtype=torch.float32, device="cuda"),) * 2
            return None

        return work

    return {f"multi_tensor_{name}": build(f"multi_tensor_{name}") for name in MANY_TENSORS}
