"""torch.compile: attach the compiled module, whose graph stays whole, also with fullgraph=True."""

import torch
from torch.nn.functional import mse_loss

from xgrad_optim import XAdamW

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
x = torch.randn(64, 8)
y = x.sum(1, keepdim=True)
compiled = torch.compile(model, backend="aot_eager")  # or the default, where a compiler is installed

optimizer = XAdamW(model.parameters(), lr=1e-2)
optimizer.attach(compiled)
for _ in range(10):
    compiled.train()
    optimizer.zero_grad()
    mse_loss(compiled(x), y).backward()  # at theta_hat
    optimizer.step()
    compiled.eval()
    with torch.no_grad():
        print("loss", mse_loss(compiled(x), y).item())  # at theta
