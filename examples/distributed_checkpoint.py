"""torch.distributed.checkpoint: a run that is saved, made anew and loaded goes on where it was."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.run import main as torchrun
from torch.nn.functional import mse_loss

from xgrad_optim import XAdamW


def make() -> tuple[torch.nn.Module, XAdamW]:
    model = fully_shard(torch.nn.Linear(8, 1))
    optimizer = XAdamW(model.parameters(), lr=1e-1)
    optimizer.attach(model)
    return model, optimizer


def train(model: torch.nn.Module, optimizer: XAdamW) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        optimizer.zero_grad()
        loss = mse_loss(model(x), x.sum(1, keepdim=True))
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0:
            print("loss", loss.item())


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model, optimizer = make()
    train(model, optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id="checkpoint")  # theta

    model, optimizer = make()
    model_state, optimizer_state = get_state_dict(model, optimizer)  # to be filled
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id="checkpoint")
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    train(model, optimizer)
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        main()
    else:  # as `torchrun --nproc-per-node 2` does
        torchrun(["--standalone", "--nproc-per-node=2", __file__])
