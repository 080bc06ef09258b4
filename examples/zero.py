"""ZeroRedundancyOptimizer has no eval() and train(): all ranks swap what they own, then exchange it."""

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.run import main as torchrun
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from xgrad_optim import XAdamW


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    model = DistributedDataParallel(module)
    x = torch.randn(64, 8)[dist.get_rank() :: dist.get_world_size()]
    y = x.sum(1, keepdim=True)

    zero = ZeroRedundancyOptimizer(model.parameters(), XAdamW, lr=1e-2)
    for _ in range(10):
        zero.zero_grad()
        mse_loss(model(x), y).backward()  # at theta_hat
        zero.step()

        zero.optim.eval()
        zero._sync_params()  # theta, on every rank
        with torch.no_grad():
            loss = mse_loss(module(x), y)
        if dist.get_rank() == 0:
            print("loss", loss.item())
        zero.optim.train()
        zero._sync_params()  # theta_hat, on every rank

    zero.optim.eval()
    zero._sync_params()
    zero.consolidate_state_dict()
    if dist.get_rank() == 0:
        torch.save({"model": module.state_dict(), "optimizer": zero.state_dict()}, "zero.pt")  # theta
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        main()
    else:  # as `torchrun --nproc-per-node 2` does
        torchrun(["--standalone", "--nproc-per-node=2", __file__])
