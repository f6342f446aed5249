"""A GPU that is not there: torch believes in eight H100s, and tensors on them are fake (they have no values).

`install()` turns this process into one that sees GPUs, for good: start a process of its own for it. Torch's own code
runs, down to the CUDA runtime, whose functions are overwritten in memory by ones that return success at once: fake
tensors never ask it for more than which devices and streams there are. So neither a driver nor a compiler is needed.
The machine must be Linux on x86-64, and torch's build the one for CUDA.
"""

import ctypes
import mmap
import os
import platform
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses import FakeTensorMode, fake_tensor

CUDA = "13."  # the version of the runtime whose structures are written down here
OTHER_TORCH = "`make setup` installs the torch of requirements.lock"
NUM_DEVICES = 8
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 * 2**30,
    multi_processor_count=132,
    warp_size=32,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)

# Machine code of x86-64 functions, System V calling convention: the first argument is in rdi, the second in rsi.
RETURN = b"\xc3"
SUCCESS = b"\x31\xc0" + RETURN  # xor eax, eax; ret


def _store(argument: int, value: int, size: int = 4, offset: int = 0) -> bytes:
    """Returns code that writes a value behind an argument: `mov [rdi or rsi, + offset], value`."""
    prefix = b"\x48" if size == 8 else b""
    return prefix + (b"\xc7\x87", b"\xc7\x86")[argument] + struct.pack("<ii", offset, value)


ONE_AS_FP32 = 0x3F800000
HANDLE = 0x1000  # of the stream and the event that everybody gets; nothing looks behind it
PROPERTIES = {
    304: 65536,
    308: H100.warp_size,
    320: 1024,
    360: H100.major,
    364: H100.minor,
    384: H100.multi_processor_count,
}
"""By offset in `cudaDeviceProp` of CUDA 13: registers, warp size, threads a block, capability, multiprocessors."""
RUNTIME = {
    "cudaGetDeviceProperties": b"".join(_store(0, value, offset=at) for at, value in PROPERTIES.items()) + SUCCESS,
    "cudaDeviceGetAttribute": _store(0, 1) + SUCCESS,
    "cudaGetDeviceCount": _store(0, NUM_DEVICES) + SUCCESS,
    "cudaGetDevice": _store(0, 0) + SUCCESS,
    "cudaDeviceGetStreamPriorityRange": _store(0, 0) + _store(1, -5) + SUCCESS,
    "cudaStreamCreateWithPriority": _store(0, HANDLE, size=8) + SUCCESS,
    "cudaStreamIsCapturing": _store(1, 0) + SUCCESS,
    "cudaStreamGetCaptureInfo": _store(1, 0) + SUCCESS,
    "cudaStreamGetPriority": _store(1, 0) + SUCCESS,
    "cudaEventCreateWithFlags": _store(0, HANDLE, size=8) + SUCCESS,
    "cudaEventElapsedTime": _store(0, struct.unpack("<i", struct.pack("<f", 1.0))[0])
    + SUCCESS,  # a millisecond, as fp32
    "cudaDriverGetVersion": _store(0, 13000) + SUCCESS,
    "cudaRuntimeGetVersion": _store(0, 13000) + SUCCESS,
}
SUCCEED = [
    "cudaSetDevice",
    "cudaInitDevice",
    "cudaGetLastError",
    "cudaPeekAtLastError",
    "cudaStreamQuery",
    "cudaStreamSynchronize",
    "cudaStreamWaitEvent",
    "cudaEventRecord",
    "cudaEventRecordWithFlags",
    "cudaEventQuery",
    "cudaEventDestroy",
    "cudaDeviceSynchronize",
    "cudaThreadExchangeStreamCaptureMode",
]


def install() -> None:
    """Lets torch see eight H100s in this process, from here on.

    Raises:
        ValueError: This machine or this torch cannot, or there is a real GPU.
    """
    if Path("/proc/driver/nvidia").exists():  # torch must not be asked: it remembers what it answers first
        raise ValueError("there is a real GPU; trace on a machine without one")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise ValueError("a fake GPU needs Linux on x86-64")
    if not (torch.version.cuda or "").startswith(CUDA):
        raise ValueError(
            f"a fake GPU needs a torch for CUDA {CUDA}x, and torch {torch.__version__} is for "
            f"{torch.version.cuda or 'none'}; {OTHER_TORCH}"
        )
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)  # there is no driver to ask
    libraries = Path(torch.__file__).parent / "lib"
    runtime = ctypes.CDLL(_loaded("libcudart.so"))
    _overwrite(runtime, RUNTIME | dict.fromkeys(SUCCEED, SUCCESS))
    # The driver's library, which is not there, is opened with this class; what is found in it succeeds.
    succeed = struct.pack("<Q", _address(runtime, "cudaSetDevice"))
    driver = {
        "_ZN2at14DynamicLibraryC1EPKcS2_b": RETURN,
        "_ZN2at14DynamicLibrary3symEPKc": b"\x48\xb8" + succeed + RETURN,
    }
    _overwrite(ctypes.CDLL(str(libraries / "libtorch_cpu.so")), driver)
    _answer_in_python()
    if not torch.cuda.is_available():
        raise ValueError("torch was asked for GPUs before the fake ones were there; call install() first")


class FakeTensors(FakeTensorMode):
    """Every tensor that is made inside is fake."""

    @property
    def avoid_device_init(self) -> bool:
        """So that `torch.tensor(1, device="cuda")` is made on the host first, as on a real GPU."""
        return True


def _answer_in_python() -> None:
    """Replaces what would initialise a context, or ask the device about itself, in `torch.cuda`."""
    cuda: Any = torch.cuda
    answers: dict[str, Any] = {
        "is_initialized": True,
        "_lazy_init": None,
        "init": None,
        "current_device": 0,
        "set_device": None,
        "get_device_capability": (H100.major, H100.minor),
        "get_device_properties": H100,
        "get_device_name": H100.name,
        "get_arch_list": ["sm_90"],
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "empty_cache": None,
        "set_rng_state": None,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "reset_peak_memory_stats": None,
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.IntTensor = lambda values: torch.tensor(values, dtype=torch.int32, device="cuda")
    cuda.default_generators = (torch.Generator(),) * NUM_DEVICES
    cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda *_: None
    fake_tensor.init_gpu_context = lambda *_: None
    compiled: Any = torch._C  # which convolution cuDNN would take depends on the chip; its result does not
    compiled._select_conv_backend = lambda *_, **__: compiled._ConvBackend.Cudnn
    compiled._conv_determine_backend_memory_format = lambda *_: torch.contiguous_format


def _loaded(name: str) -> str:
    """Returns the path of a library that this process has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]  # which may have spaces
        if Path(path).name.startswith(name):
            return path
    raise ValueError(f"torch {torch.__version__} has not loaded {name}, which a fake GPU replaces; {OTHER_TORCH}")


def _address(library: ctypes.CDLL, function: str) -> int:
    try:
        address = ctypes.cast(getattr(library, function), ctypes.c_void_p).value
    except AttributeError:
        lacking = f"{library._name} of torch {torch.__version__} has no {function}"
        raise ValueError(f"{lacking}, which a fake GPU replaces; {OTHER_TORCH}") from None
    assert address is not None
    return address


def _overwrite(library: ctypes.CDLL, code: dict[str, bytes]) -> None:
    """Replaces functions of a library, in the memory of this process, by machine code."""
    libc = ctypes.CDLL(None, use_errno=True)
    for function, replacement in code.items():
        address = _address(library, function)
        start = address & -mmap.PAGESIZE
        length = address + len(replacement) - start
        if libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(length), 7):  # readable, writable, executable
            raise OSError(ctypes.get_errno(), f"cannot replace {function}")
        ctypes.memmove(address, replacement, len(replacement))
