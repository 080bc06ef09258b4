"""Parameters do not see each other: each ends with the same bits whatever shares its optimizer, group or launch.

Breaks where tensors are bundled, split into blocks, share rows of coefficients or step counts, and where a neighbour
has no gradient.
"""

import pytest
import torch
from cases import every_class
from family import MEMBERS
from training import (
    COMPLEX_DTYPES,
    PARAM,
    REAL_DTYPES,
    assert_same,
    assert_same_bits,
    cloned_params,
    clones,
    either_mode,
    either_precision,
    feed,
    gradient,
    make_params,
    options,
    random,
    thetas,
    train,
    trained,
)


def assert_steps_like_loners(cls, params, schedule, groups=None, steps=6, **kwargs):
    """Train together, and each in an optimizer of its own; `schedule[place]`: the steps in which it has a gradient."""
    loners = cloned_params(params)
    groups = groups or [{"params": params}]
    optimizer = cls([{**group, "params": list(group["params"])} for group in groups], **options(cls, **kwargs))
    places = {id(param): place for place, param in enumerate(params)}
    alone = list(loners)
    for group in groups:
        own = {key: value for key, value in group.items() if key != "params"}
        for place in (places[id(param)] for param in group["params"]):
            alone[place] = cls([loners[place]], **options(cls, **kwargs) | own)
    for step in range(steps):
        feed(params, step, skip=[place for place in range(len(params)) if step not in schedule[place]])
        optimizer.step()
        for place, loner in enumerate(loners):
            loner.grad = gradient(loner, place, step) if step in schedule[place] else None
            alone[place].step()
            assert_same(optimizer, [params[place]], alone[place], [loner])
        if step % 2:
            optimizer.eval()
            for place, loner in enumerate(loners):
                assert_same_bits(thetas(alone[place], [loner])[0], params[place])


@every_class
@either_precision
def test_parameters_without_gradient_at_some_steps_and_one_that_joins_later(cls, master_weights):
    params = make_params([(3, 4), (5,), (), (2, 2, 2), (6,)])
    schedule = [range(6), (0, 1, 4, 5), (0, 2, 4), range(3, 6), ()]
    assert_steps_like_loners(cls, params[:4], schedule, master_weights=master_weights)
    optimizer = cls(params, **options(cls))
    feed(params, 0, skip=[4])
    optimizer.step()
    assert params[4] not in optimizer.state or not optimizer.state[params[4]]


COMMON_GROUP_OPTIONS = [
    {},
    {"prediction_steps": 0},
    {"prediction_steps": 7.5},
    {"master_weights": True},
    {"maximize": True},
    {"lr": torch.tensor(0.25)},
    {"lr": 0.0},
]
GROUP_OPTIONS = [
    {"lr": 0.3},
    {"weight_decay": 0.0},
    {"momentum": 0.0},
    {"dampening": 0.0},
    {"betas": (0.5, 0.6)},
    {"eps": 0.1},
    {"amsgrad": True},
    {"amsgrad": True, "master_weights": True, "maximize": True},
    {"decoupled_weight_decay": False},
]


@every_class
def test_groups_with_different_options(cls):
    member = MEMBERS[cls]
    own = COMMON_GROUP_OPTIONS + [options for options in GROUP_OPTIONS if member.takes(*options)]
    known = {name for options in GROUP_OPTIONS for name in options}
    own += [{name: member.arguments[name] / 2} for name in member.numbers if name not in known]
    params = make_params([(4,)] * len(own) + [(2, 3)] * len(own))
    groups = [{"params": params[place :: len(own)], **group} for place, group in enumerate(own)]
    schedule = [range(6) if place % 3 else (0, 1, 3, 5) for place in range(len(params))]
    assert_steps_like_loners(cls, params, schedule, groups)


@every_class
def test_parameters_of_every_dtype_in_one_group(cls):
    params = [PARAM(random((4, 3), place, dtype)) for place, dtype in enumerate((*REAL_DTYPES, *COMPLEX_DTYPES) * 2)]
    kwargs = {"eps": 1e-3} if MEMBERS[cls].takes("eps") else {}
    assert_steps_like_loners(cls, params, [range(4)] * len(params), steps=4, **kwargs)


@every_class
def test_many_tiny_parameters(cls):
    """More than one bundle of small tensors, with sizes around nothing."""
    params = make_params([((place % 5),) if place % 7 else () for place in range(300)])
    loners = [PARAM(torch.cat([value.reshape(-1) for value in clones(params)]))]
    optimizer, alone = cls(params, **options(cls)), cls(loners, **options(cls))
    for step in range(3):
        feed(params, step)
        loners[0].grad = torch.cat([param.grad.reshape(-1) for param in params])
        optimizer.step()
        alone.step()
        assert_same_bits(torch.cat([value.reshape(-1) for value in clones(params)]), loners[0])


@every_class
@pytest.mark.parametrize("numel", [1 << 14, (1 << 14) + 1, 1 << 19, (1 << 19) + 1, (1 << 20) + 3])
def test_sizes_around_the_ends_of_blocks(cls, numel):
    """The same numbers as parameters of 1000 elements each, which fit into one block."""
    whole = make_params([(numel,)])
    parts = [PARAM(part.clone()) for part in whole[0].detach().split(100_000)]
    optimizer, alone = cls(whole, **options(cls)), cls(parts, **options(cls))
    for step in range(2):
        feed(whole, step)
        for part, grad in zip(parts, whole[0].grad.split(100_000), strict=True):
            part.grad = grad.clone()
        optimizer.step()
        alone.step()
    assert_same_bits(whole[0], torch.cat(clones(parts)))
    assert_same_bits(thetas(optimizer, whole)[0], torch.cat(thetas(alone, parts)))


@every_class
@either_mode
def test_add_param_group_in_mid_training(cls, predicted):
    optimizer, params = trained(cls)
    twin, twin_params = trained(cls)
    added, alone_params = make_params([(4, 2), ()], seed=40), make_params([(4, 2), ()], seed=40)
    optimizer.train(predicted)
    optimizer.add_param_group({"params": added, "lr": 0.3, "prediction_steps": 1.0})
    alone = cls(alone_params, **options(cls, lr=0.3, prediction_steps=1.0))
    assert optimizer.predicted is predicted
    for step in range(3, 6):
        for each, its_params in ((twin, twin_params), (alone, alone_params)):
            train(each, its_params, [step])
        feed(params, step)
        feed(added, step)
        optimizer.step()
        assert_same(optimizer, params, twin, twin_params)
        assert_same(optimizer, added, alone, alone_params)


@every_class
@either_precision
@pytest.mark.parametrize("shapes", [[(0,)], [(0, 3)], [(2, 0), (0,)], [()], [(0,), (), (4,)]], ids=str)
def test_empty_and_0_dim_parameters(cls, master_weights, shapes):
    params = make_params(shapes)
    assert_steps_like_loners(cls, params, [range(4)] * len(params), steps=4, master_weights=master_weights)
