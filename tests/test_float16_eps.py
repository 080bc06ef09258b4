"""Pure float16 state that can't hold the eps which is added to it: said once, with the two ways out.

Else updates are divided by next to nothing, and weights blow up within a few steps. An eps that is added to the root
alone, as Adam's, is added in float32, and nothing is said.
"""

import copy
import warnings

import pytest
import torch
from cases import every_optimizer
from family import MEMBERS, taking

pytestmark = pytest.mark.filterwarnings("error")
STORING = [cls for cls in taking("eps") if "eps" in cls.rule.stored_options]
every_storing = pytest.mark.parametrize("cls", STORING, ids=lambda cls: cls.__name__)


def param_of(dtype, scale=1.0):
    param = torch.nn.Parameter(torch.randn(50).to(dtype))
    param.grad = (torch.randn(50) * scale).to(dtype)
    return param


@every_storing
@pytest.mark.parametrize("options", [{}, {"eps": 1e-8}, {"amsgrad": True}, {"eps": torch.tensor(2e-8)}], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_lost_eps_warns_once(cls, options, backend):
    params = [param_of(torch.float16) for _ in range(3)]
    late = param_of(torch.float16)
    optimizer = cls([*params, late], backend=backend, **options)
    late.grad = None
    with pytest.warns(UserWarning, match=r"is 0 in float16.* master_weights=True, .* a larger eps, of 1e-7") as record:
        optimizer.step()
        optimizer.eval()
        late.grad = torch.ones_like(late)
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
    assert len(record) == 1


@pytest.mark.parametrize("cls", [cls for cls in STORING if "eps" not in cls.rule.positive_options])
def test_an_eps_of_zero_is_lost_as_well(cls):
    with pytest.warns(UserWarning, match=r"eps=0.0 is 0 in float16"):
        cls([param_of(torch.float16)], eps=0.0).step()


@every_storing
def test_the_eps_is_that_of_the_parameter_s_group(cls):
    groups = [{"params": [param_of(torch.float32)]}, {"params": [param_of(torch.float16)], "eps": 1e-6}]
    cls(groups).step()
    groups = [{"params": [param_of(torch.float16)]}, {"params": [param_of(torch.float32)], "eps": 1e-6}]
    with pytest.warns(UserWarning, match=f"eps={MEMBERS[cls].arguments['eps']} is 0"):
        cls(groups).step()


@every_storing
def test_a_warning_that_raises_changes_nothing(cls):
    param = param_of(torch.float16)
    before = param.detach().clone()
    optimizer = cls([param])
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="float16"):
        warnings.simplefilter("error")
        optimizer.step()
    assert torch.equal(param, before)
    assert not any(optimizer.state.values())


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_hold_it(case, dtype):
    case.make([param_of(dtype)]).step()


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_master_weights_hold_it(case, dtype):
    case.make([param_of(dtype)], master_weights=True).step()


@pytest.mark.parametrize("cls", [cls for cls in taking("eps") if cls not in STORING])
def test_the_others_add_it_in_float32(cls):
    cls([param_of(torch.float16)]).step()


@every_storing
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e-2, 1.0])
def test_the_eps_that_is_named_trains(cls, scale):
    param = param_of(torch.float16, scale)
    before = param.detach().clone()
    optimizer = cls([param], lr=1e-3, eps=1e-7)
    for _ in range(10):
        optimizer.step()
    optimizer.eval()
    # Neither rule moves a weight much further than lr / (1 - beta1) in one step.
    assert (param - before).abs().max() <= 10 * 1e-2
