"""What reads or writes parameters (averages, batch statistics, weight clipping) does so inside `true_weights()`."""

import torch
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from xgrad_optim import XAdamW

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
x = torch.randn(64, 8)
y = x.sum(1, keepdim=True)
optimizer = XAdamW(model.parameters(), lr=1e-2)
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))

for _ in range(20):
    optimizer.zero_grad()
    loss = mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    with optimizer.true_weights(), torch.no_grad():
        for param in model.parameters():
            param.clamp_(-1, 1)  # clips theta
        ema.update_parameters(model)  # averages theta
    print("loss", loss.item())
update_bn(x.split(16), ema)

with optimizer.true_weights():  # batch statistics of theta itself
    update_bn(x.split(16), model)

optimizer.eval()
model.load_state_dict(ema.module.state_dict())  # the average becomes theta
optimizer.train()
