import torch

from xgrad_optim import XAdamW

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
x = torch.randn(256, 8)
y = x.sum(1, keepdim=True)

optimizer = XAdamW(model.parameters(), lr=1e-2)  # was: torch.optim.AdamW(model.parameters(), lr=1e-2)
optimizer.attach(model)  # the model's own mode decides which weights it sees

for _ in range(5):
    for inputs, targets in zip(x.split(32), y.split(32), strict=True):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model.train()(inputs), targets).backward()  # at theta_hat, the predicted weights
        optimizer.step()  # restores theta, updates it, predicts: one pass
    with torch.no_grad():
        print("loss", torch.nn.functional.mse_loss(model.eval()(x), y).item())  # at theta, the true weights

torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "checkpoint.pt")  # theta
