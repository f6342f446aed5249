"""Transformer Engine's 8-bit tensors without its compiled part: making them, transposing them, multiplying them.

What a quantizer makes is laid out by Transformer Engine's own Python, as it is for `torch.compile`. Checks and kernels
are those of its C++ sources, 2.20, on Hopper: quantizer.cpp, extensions/cast.cpp and bias.cpp, cublaslt_gemm.cu.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.fake_gpu.recorder import Recorder

FP8 = {7: torch.float8_e4m3fn, 8: torch.float8_e5m2}  # by number of Transformer Engine's type
ROWS, INNER = 8, 16  # what an FP8 product's outer and inner sizes are multiples of


def engine(module: str) -> Any:
    """Returns a module of Transformer Engine's Python for torch, which pyright cannot find."""
    return importlib.import_module(f"transformer_engine.pytorch.{module}")


def quantization(recorder: Recorder) -> dict[str, Callable[..., Any]]:
    """Returns the stand-ins for what makes 8-bit tensors and keeps their scales."""

    def create_empty_quantized_tensor(
        quantizer: Any, shape: list[int], dtype: torch.dtype, device: torch.device, pin_memory: bool
    ) -> Any:
        assert not pin_memory, "no stand-in for an 8-bit tensor in pinned memory"
        return made_by(quantizer, shape, dtype, device)

    def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
        assert tensor.is_cuda and tensor.is_floating_point() and tensor.element_size() > 1, (
            tensor.device,
            tensor.dtype,
        )
        tensor = tensor.contiguous()
        if output is None:
            output = made_by(quantizer, tensor.shape, tensor.dtype, tensor.device)
        else:
            assert output.size() == tensor.shape, (output.size(), tensor.shape)
        if not tensor.numel():
            return output
        rowwise, columnwise = data_of(output)
        made = [part for part in (rowwise, columnwise) if part is not None]
        assert made, "a quantizer that makes nothing"
        if isinstance(quantizer, engine("tensor.float8_tensor").Float8CurrentScalingQuantizer):
            amax = torch.empty(1, dtype=torch.float32, device=tensor.device)
            recorder.add("kernel", "te.compute_amax", [tensor], [amax])
            if quantizer.with_amax_reduction:
                group = quantizer._canonicalized_amax_reduction_group()
                torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=group)
            recorder.add("kernel", "te.compute_scale_from_amax", [amax], [output._scale_inv])
        assert rowwise is not None or "Blockwise" in type(output).__name__, "a transpose alone has no kernel"
        recorder.add("kernel", "te.quantize", [tensor], made)
        return output

    def bgrad_quantize(grad_output: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
        is_delayed = isinstance(quantizer, engine("tensor.float8_tensor").Float8Quantizer)
        fused = is_delayed and quantizer.rowwise_usage and quantizer.columnwise_usage
        rows = grad_output.contiguous().reshape(-1, grad_output.shape[-1])
        if not fused or not rows.numel():
            return rows.sum(dim=0), quantize(grad_output, quantizer)
        bias_grad = rows.new_empty(rows.shape[-1])
        quantized = made_by(quantizer, grad_output.shape, grad_output.dtype, grad_output.device)
        recorder.add(
            "kernel",
            "te.quantize_dbias",
            [grad_output],
            [*(part for part in data_of(quantized) if part is not None), bias_grad],
        )
        return bias_grad, quantized

    def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
        assert data.is_cuda and data.dtype == torch.uint8 and data.is_contiguous()
        shape = (data.shape[-1], *data.shape[:-1])
        out = data.new_empty(shape) if out is None else out
        assert out.shape == shape, (out.shape, shape)
        if data.numel():
            recorder.add("kernel", "te.fp8_transpose", [data], [out])
        return out

    def dequantize(tensor: Any, dtype: Any) -> Tensor:
        rowwise, _ = data_of(tensor)
        assert rowwise is not None
        out = torch.empty(rowwise.shape, dtype=engine("constants").TE_DType_To_Torch[dtype], device=rowwise.device)
        recorder.add("kernel", "te.dequantize", [rowwise], [out])
        return out

    def compute_amax(tensor: Tensor, amax: Tensor) -> None:
        assert tensor.is_cuda and tensor.is_contiguous() and amax.dtype == torch.float32 and amax.numel() == 1
        recorder.add("kernel", "te.compute_amax", [tensor], [amax])

    def fp8_block_scaling_compute_partial_amax(
        tensor: Tensor, amax: Tensor, height: int, width: int, start: int, block: int
    ) -> None:
        check_part(tensor, amax, height, width, start, block)
        recorder.add("kernel", "te.partial_amax", [tensor], [amax])

    def fp8_block_scaling_partial_cast(
        tensor: Tensor, out: Tensor, scale: Tensor, height: int, width: int, start: int, block: int, dtype: Any
    ) -> None:
        check_part(tensor, scale, height, width, start, block)
        assert out.dtype == torch.uint8 and out.numel() == tensor.numel(), (out.dtype, out.shape)
        recorder.add("kernel", "te.partial_cast", [tensor, scale], [out.view(FP8[int(dtype)])])

    def fused_amax_and_scale_update_after_reduction(
        amax: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: Any, margin: float
    ) -> None:
        assert len(amax) == sum(len(scale) for scale in scales)
        assert all(history.shape[1:] == scale.shape for history, scale in zip(histories, scales, strict=True))
        recorder.add("kernel", "te.amax_and_scale_update", [amax, *histories], scales)

    def swap_first_dims(tensor: Tensor, *, out: Tensor | None = None) -> Tensor:
        shape = (tensor.shape[1], tensor.shape[0], *tensor.shape[2:])
        out = tensor.new_empty(shape) if out is None else out
        assert out.shape == shape and tensor.is_contiguous()
        recorder.add("kernel", "te.swap_first_dims", [tensor], [out])
        return out

    return {
        function.__name__: function
        for function in (
            create_empty_quantized_tensor,
            quantize,
            bgrad_quantize,
            fp8_transpose,
            dequantize,
            compute_amax,
            fp8_block_scaling_compute_partial_amax,
            fp8_block_scaling_partial_cast,
            fused_amax_and_scale_update_after_reduction,
            swap_first_dims,
        )
    }


def let_parts_be_fake() -> None:
    """Lets views of 8-bit tensors be taken: their class calls `__torch_dispatch__` of the parts as a plain tensor's.

    That of a fake tensor refuses, because it sees the class among the types. So the types are left out, and it does
    what a plain tensor does where there are none.
    """
    for module, name in (("float8_tensor", "Float8Tensor"), ("float8_blockwise_tensor", "Float8BlockwiseQTensor")):
        cls = getattr(engine(f"tensor.{module}"), name)
        cls.__torch_dispatch__ = classmethod(partial(_without_types, cls.__torch_dispatch__.__func__))
    fake: Any = FakeTensor
    fake.__torch_dispatch__ = classmethod(partial(_as_plain, fake.__torch_dispatch__.__func__))


def _without_types(own: Any, cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    return own(cls, func, (), args, kwargs or {})


def _as_plain(own: Any, cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    return own(cls, func, types, args, kwargs or {}) if types else func(*args, **(kwargs or {}))


def made_by(quantizer: Any, shape: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Returns an 8-bit tensor without values, with the parts that a quantizer is set to make."""
    # That of the delayed recipe cannot be compiled, so its layout is not written down: it is that of the other.
    tensors = engine("tensor.float8_tensor")
    tensors.Float8Quantizer.inner_tensor_specs = tensors.Float8CurrentScalingQuantizer.inner_tensor_specs
    tensors.Float8Quantizer.storage_metadata = tensors.Float8CurrentScalingQuantizer.storage_metadata
    return (
        engine("dynamo.tensor_spec")
        .TensorSpec(tuple(shape), dtype, quantizer, device=torch.device(device))
        .create_tensor()
    )


def data_of(tensor: Any) -> tuple[Tensor | None, Tensor | None]:
    """Returns the values of an 8-bit tensor by row and by column, as 8-bit floats; nothing for what is not there."""
    names = ("_data", "_transpose") if hasattr(tensor, "_data") else ("_rowwise_data", "_columnwise_data")
    dtype = FP8[int(tensor._fp8_dtype)]
    rowwise, columnwise = (None if part is None else part.view(dtype) for part in (getattr(tensor, n) for n in names))
    return rowwise, None if getattr(tensor, "_transpose_invalid", False) else columnwise


def check_part(part: Tensor, scales: Tensor, height: int, width: int, start: int, block: int) -> None:
    """Makes sure that a flat part of a weight can be scaled by blocks (fp8_partial_cast.cpp)."""
    assert part.is_cuda and part.dtype in (torch.float32, torch.bfloat16) and part.is_contiguous()
    assert block == 128 and scales.dtype == torch.float32 and scales.shape[0] == -(-height // block), scales.shape
    assert scales.shape[1] >= -(-width // block) and start + part.numel() <= height * width


def operand(tensor: Any, is_columnwise: bool) -> Tensor:
    """Returns what a matrix product reads of an operand, after checking that it is there.

    Hopper multiplies 8-bit numbers along rows only: a product over columns reads the transposed copy.
    """
    if isinstance(tensor, Tensor) and not hasattr(tensor, "_fp8_dtype"):
        assert tensor.is_contiguous(), tensor.stride()
        return tensor
    part = data_of(tensor)[is_columnwise]
    assert part is not None, f"{type(tensor).__name__} lacks its {'column' if is_columnwise else 'row'}-wise values"
    return part


def check_sizes(num_rows: int, num_columns: int, num_inner: int, a: Tensor, b: Tensor) -> None:
    """Makes sure that cuBLAS has a kernel: both operands in 8 bits or neither, at most one of them E5M2, and sizes."""
    in_8_bits = [x.dtype in FP8.values() for x in (a, b)]
    if not any(in_8_bits):
        assert a.dtype == b.dtype, (a.dtype, b.dtype)
    elif num_rows and num_inner:
        assert all(in_8_bits) and {a.dtype, b.dtype} != {torch.float8_e5m2}, (a.dtype, b.dtype)
        assert num_rows % ROWS == num_columns % ROWS == num_inner % INNER == 0, (num_rows, num_columns, num_inner)
