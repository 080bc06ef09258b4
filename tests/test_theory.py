"""What docs/theory.md says of momentum with prediction: it is quasi-hyperbolic momentum, and how large lr may be."""

import pytest
import torch

from xgrad_optim import XSGDM

SETTINGS = [(momentum, steps) for momentum in (0.5, 0.9, 0.99) for steps in (0.0, 0.5, 1.0, 2.5)]
every_setting = pytest.mark.parametrize(("momentum", "prediction_steps"), SETTINGS)


def gradient(theta: torch.Tensor) -> torch.Tensor:
    """Of a curved valley: no two steps see the same curvature."""
    return torch.sin(3 * theta) + theta**3 * torch.linspace(0.1, 2, len(theta), dtype=theta.dtype)


def predicted_weights(lr: float, momentum: float, prediction_steps: float, count: int) -> list[torch.Tensor]:
    """theta_hat before each step."""
    param = torch.nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
    optimizer = XSGDM([param], lr=lr, momentum=momentum, prediction_steps=prediction_steps)
    seen = []
    for _ in range(count):
        seen.append(param.detach().clone())
        param.grad = gradient(param.detach())
        optimizer.step()
    return seen


def quasi_hyperbolic(alpha: float, nu: float, beta: float, count: int) -> list[torch.Tensor]:
    """Ma and Yarats, equations 3 and 4: theta <- theta - alpha * ((1 - nu) * g + nu * m)."""
    theta, m = torch.linspace(-1, 1, 7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    seen = []
    for _ in range(count):
        seen.append(theta)
        g = gradient(theta)
        m = beta * m + (1 - beta) * g
        theta = theta - alpha * ((1 - nu) * g + nu * m)
    return seen


@every_setting
def test_the_predicted_weights_take_the_steps_of_quasi_hyperbolic_momentum(momentum, prediction_steps):
    lr = 0.01
    nu = 1 - prediction_steps * (1 - momentum) / momentum
    ours = predicted_weights(lr, momentum, prediction_steps, 200)
    theirs = quasi_hyperbolic(lr / (1 - momentum), nu, momentum, 200)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=1e-12)


def test_another_nu_is_another_method():
    ours, theirs = predicted_weights(0.01, 0.9, 1.0, 50), quasi_hyperbolic(0.1, 0.9, 0.9, 50)
    assert (ours[-1] - theirs[-1]).abs().max() > 1e-4


@every_setting
@pytest.mark.parametrize(("factor", "is_stable"), [(0.99, True), (1.01, False)], ids=["below", "above"])
def test_the_largest_stable_lr(momentum, prediction_steps, factor, is_stable):
    curvature = 3.0
    largest = 2 * (1 + momentum) / ((1 + 2 * prediction_steps) * curvature)
    param = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = XSGDM([param], lr=factor * largest, momentum=momentum, prediction_steps=prediction_steps)
    for _ in range(4000):
        param.grad = curvature * param.detach()
        optimizer.step()
    optimizer.eval()
    assert (param.abs() < 1) == is_stable
