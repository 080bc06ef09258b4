"""DistributedDataParallel. One rank evaluates and saves by itself: a swap is no collective."""

import torch
import torch.distributed as dist
from torch.distributed.run import main as torchrun
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from xgrad_optim import XAdamW


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    model = DistributedDataParallel(module)  # before the first step: its constructor writes the parameters
    x = torch.randn(64, 8)[dist.get_rank() :: dist.get_world_size()]
    y = x.sum(1, keepdim=True)

    optimizer = XAdamW(model.parameters(), lr=1e-2)
    optimizer.attach(model)  # the wrapper, or the module inside
    for _ in range(10):
        model.train()
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()  # at theta_hat
        optimizer.step()
        if dist.get_rank() == 0:
            with torch.no_grad():
                print("loss", mse_loss(module.eval()(x), y).item())  # at theta
    if dist.get_rank() == 0:
        torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, "ddp.pt")  # theta
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        main()
    else:  # as `torchrun --nproc-per-node 2` does
        torchrun(["--standalone", "--nproc-per-node=2", __file__])
