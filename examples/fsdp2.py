"""FSDP2: shard, then make the optimizer, then attach."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.run import main as torchrun
from torch.nn.functional import mse_loss

from xgrad_optim import XAdamW


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    x = torch.randn(64, 8)[dist.get_rank() :: dist.get_world_size()]
    y = x.sum(1, keepdim=True)
    fully_shard(model[0])
    fully_shard(model)

    optimizer = XAdamW(model.parameters(), lr=1e-2)
    optimizer.attach(model)
    for _ in range(10):
        model.train()
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()  # at theta_hat
        optimizer.step()
        model.eval()
        with torch.no_grad():
            loss = mse_loss(model(x), y)  # at theta
        if dist.get_rank() == 0:
            print("loss", loss.item())
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        main()
    else:  # as `torchrun --nproc-per-node 2` does
        torchrun(["--standalone", "--nproc-per-node=2", __file__])
