"""What megatron-core asks of CUDA is answered by the CPU."""

import torch

from model.cpu_backend import use_cpu_as_cuda


def test_cuda_devices_mean_the_cpu_and_types_have_cuda_names():
    use_cpu_as_cuda()
    use_cpu_as_cuda()  # twice is once
    tensor = torch.zeros(2, device="cuda")
    assert tensor.device.type == "cpu"
    assert tensor.cuda() is tensor
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert tensor.to("cuda").device.type == torch.ones(1, device=0).device.type == "cpu"
    assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
    torch.cuda.synchronize()
