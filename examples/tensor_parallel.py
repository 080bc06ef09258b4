"""Tensor parallelism: nothing to do, the optimizer runs on the local shards."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.run import main as torchrun
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss

from xgrad_optim import XAdamW


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    x = torch.randn(64, 8)
    y = x.sum(1, keepdim=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})

    optimizer = XAdamW(model.parameters(), lr=1e-2)
    optimizer.attach(model)
    for _ in range(10):
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)  # at theta_hat
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0:
            print("loss", loss.item())
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        main()
    else:  # as `torchrun --nproc-per-node 2` does
        torchrun(["--standalone", "--nproc-per-node=2", __file__])
