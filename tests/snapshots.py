"""Optimizers in mid-training, and every bit of them before and after something that must change nothing."""

import copy

import pytest
import torch


def filled(*shape, seed=0):
    """A parameter with a gradient, both from this seed."""
    generator = torch.Generator().manual_seed(seed)
    param = torch.nn.Parameter(torch.randn(*shape, generator=generator))
    param.grad = torch.randn(*shape, generator=generator)
    return param


def trained(cls, **kwargs):
    """An optimizer in mid-training, with two groups, and its parameters."""
    params = [filled(3, 2, seed=1), filled(4, seed=2)]
    optimizer = cls([{"params": params[:1]}, {"params": params[1:], "lr": 0.02}], **kwargs)
    optimizer.step()
    return optimizer, params


def snapshot(optimizer):
    """Every bit of an optimizer: options, parameters, gradients and state."""
    groups = [
        {
            key: [id(param) for param in value] if key == "params" else copy.deepcopy(value)
            for key, value in group.items()
        }
        for group in optimizer.param_groups
    ]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    tensors = [param.detach().clone() for param in params] + [param.grad.clone() for param in params]
    state = [
        (index, key, value.clone())
        for index, param in enumerate(params)
        for key, value in optimizer.state.get(param, {}).items()
    ]
    return groups, tensors, state


def assert_unchanged(optimizer, before):
    groups, tensors, state = snapshot(optimizer)
    assert groups == before[0]
    assert all(map(torch.equal, tensors, before[1]))
    assert [entry[:2] for entry in state] == [entry[:2] for entry in before[2]]
    assert all(torch.equal(now[2], then[2]) for now, then in zip(state, before[2], strict=True))


def message_of(call, error):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)
