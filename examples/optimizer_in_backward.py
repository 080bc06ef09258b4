"""The optimizer inside of backward: a gradient is used and freed as soon as it is complete."""

import torch
from torch.nn.functional import mse_loss

from xgrad_optim import XAdamW

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
x = torch.randn(64, 8)
y = x.sum(1, keepdim=True)
optimizers = {param: XAdamW([param], lr=1e-2) for param in model.parameters()}


def step_and_free(param: torch.Tensor) -> None:
    optimizers[param].step()
    param.grad = None


for param, optimizer in optimizers.items():
    optimizer.attach(model)
    param.register_post_accumulate_grad_hook(step_and_free)

for _ in range(10):
    mse_loss(model.train()(x), y).backward()  # at theta_hat; steps as it goes
    with torch.no_grad():
        print("loss", mse_loss(model.eval()(x), y).item())  # at theta
