"""Options that choose a back end which the machine lacks: refused with every reason, before anything changes."""

import pytest
import torch
from cases import every_class
from training import assert_unchanged, filled, message_of, snapshot, trained_in_two_groups

from xgrad_optim import available_backends, backends


@pytest.fixture
def no_native_backend(monkeypatch):
    """A machine that has only the torch back end."""
    module = backends._module
    monkeypatch.setattr(
        backends, "_module", lambda name: module(name) if name == "torch" else f"no {name} on this machine"
    )


@every_class
@pytest.mark.parametrize("name", ["triton", "cuda", "cpu"])
def test_a_demanded_backend_that_is_absent_raises_and_says_why(cls, name, no_native_backend):
    message = message_of(lambda: cls([filled(2)], backend=name), RuntimeError)
    assert f"backend={name!r}" in message and f"no {name} on this machine" in message


@every_class
def test_fused_without_any_native_backend_raises_and_names_each_reason(cls, no_native_backend):
    message = message_of(lambda: cls([filled(2)], fused=True), RuntimeError)
    assert "fused=True" in message
    assert all(f"no {name} on this machine" in message for name in ("triton", "cpu"))


@every_class
def test_a_group_that_demands_an_absent_backend_is_not_added(cls, no_native_backend):
    optimizer, _ = trained_in_two_groups(cls)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="no cuda on this machine"):
        optimizer.add_param_group({"params": [filled(2)], "backend": "cuda"})
    assert_unchanged(optimizer, before)


@every_class
def test_a_group_that_is_moved_to_an_absent_backend_raises_in_step_and_changes_nothing(cls, no_native_backend):
    optimizer, _ = trained_in_two_groups(cls)
    optimizer.param_groups[1]["backend"] = "cuda"
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="no cuda on this machine"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@every_class
@pytest.mark.parametrize("kwargs", [{"backend": "torch"}, {"foreach": True}, {"fused": False}], ids=str)
def test_the_torch_backend_can_always_be_demanded(cls, kwargs, no_native_backend):
    _, params = trained_in_two_groups(cls, **kwargs)
    _, expected = trained_in_two_groups(cls)
    assert all(map(torch.equal, params, expected))


def test_available_backends_gives_a_reason_for_each_absent_one():
    reasons = available_backends()
    assert list(reasons) == ["triton", "cuda", "cpu", "torch"]
    assert reasons["torch"] is None
    assert all(reason is None or reason.strip() for reason in reasons.values())


@every_class
def test_capturable_on_the_cpu_raises_and_changes_nothing(cls):
    param = filled(3)
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="capturable=True"):
        optimizer = cls([param], capturable=True)
        assert not optimizer.state
        optimizer.step()
    assert torch.equal(param, before)
