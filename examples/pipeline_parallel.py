"""Pipeline parallelism: one optimizer for each stage. Between the micro-batches of a step nothing is swapped."""

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.run import main as torchrun
from torch.nn.functional import mse_loss

from xgrad_optim import XAdamW


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
    stage = PipelineStage(module, rank, size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=mse_loss)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))

    optimizer = XAdamW(module.parameters(), lr=1e-2)
    optimizer.attach(module)
    for _ in range(10):
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(x)
        elif rank == size - 1:
            schedule.step(target=x.flip(1), losses=losses)
            print("loss", torch.stack(losses).mean().item())  # at theta_hat
        else:
            schedule.step()
        optimizer.step()
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        main()
    else:  # as `torchrun --nproc-per-node 2` does
        torchrun(["--standalone", "--nproc-per-node=2", __file__])
