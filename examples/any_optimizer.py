"""Any optimizer: Muon for the matrices of the hidden layers, predicted by XGrad; XAdamW for the rest."""

import torch
from torch.nn.functional import mse_loss

from xgrad_optim import XAdamW, XGrad

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32), torch.nn.Linear(32, 1))
x = torch.randn(256, 8)
y = x.sum(1, keepdim=True)
hidden = [model[0].weight, model[2].weight]
rest = [param for param in model.parameters() if all(param is not matrix for matrix in hidden)]
optimizers = XGrad(torch.optim.Muon(hidden, lr=1e-2)), XAdamW(rest, lr=1e-2)
for optimizer in optimizers:
    optimizer.attach(model)

for _ in range(5):
    for inputs, targets in zip(x.split(32), y.split(32), strict=True):
        model.zero_grad()
        mse_loss(model.train()(inputs), targets).backward()  # at theta_hat, each by its own last update
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        print("loss", mse_loss(model.eval()(x), y).item())  # at theta
