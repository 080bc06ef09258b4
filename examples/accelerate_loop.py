"""accelerate: attach before `prepare`, where the optimizer itself is at hand, or after it."""

import torch
from accelerate import Accelerator
from torch.nn.functional import mse_loss

from xgrad_optim import XAdamW

torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
x = torch.randn(64, 8)
y = x.sum(1, keepdim=True)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)

optimizer = XAdamW(model.parameters(), lr=1e-2)
optimizer.attach(model)
model, optimizer, data = accelerator.prepare(model, optimizer, data)

for _ in range(4):
    model.train()
    for inputs, targets in data:
        with accelerator.accumulate(model):
            accelerator.backward(mse_loss(model(inputs), targets))  # at theta_hat
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        print("loss", mse_loss(model(x), y).item())  # at theta
    accelerator.save_state("output/state")  # theta
