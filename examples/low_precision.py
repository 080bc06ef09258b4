"""bfloat16 parameters with float32 master weights: the memory of a float32 model, no casts in the forward."""

import torch
from torch.nn.functional import mse_loss

from xgrad_optim import XAdamW

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).bfloat16()
x = torch.randn(64, 8, dtype=torch.bfloat16)
y = x.sum(1, keepdim=True)

optimizer = XAdamW(model.parameters(), lr=1e-2, master_weights=True)
optimizer.attach(model)
for _ in range(10):
    optimizer.zero_grad()
    mse_loss(model.train()(x), y).backward()  # at theta_hat
    optimizer.step()
    with torch.no_grad():
        print("loss", mse_loss(model.eval()(x), y).item())  # at theta
