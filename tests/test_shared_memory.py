"""Two parameters over the same memory are refused when their state is made; all that only lies close is taken.

Each would be updated and predicted over what the other has just written: a lost update on one back end, a theta that
drifts with every swap on another. False alarms would be as bad: flat buffers of FSDP, DDP, ZeRO and cuDNN hold
parameters side by side, and views may lie between each other.
"""

import hypothesis.strategies as st
import pytest
import torch
from cases import every_optimizer
from hypothesis import given, settings
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter

from xgrad_optim import XSGDM, XAdamW
from xgrad_optim.layout import shared_memory

either_backend = pytest.mark.parametrize("backend", ["cpu", "torch"])


def tied_through_data():
    a, b = Parameter(torch.randn(40, 5)), Parameter(torch.zeros(40, 5))
    b.data = a.data
    return [a, b]


def slices(first, second):
    buffer = torch.randn(300)
    return [Parameter(buffer[first]), Parameter(buffer[second])]


def complex_and_its_real_view():
    values = torch.randn(6, dtype=torch.complex64)
    return [Parameter(values), Parameter(torch.view_as_real(values))]


def real_and_imaginary_parts():
    values = torch.randn(5, dtype=torch.complex64)
    return [Parameter(values.real), Parameter(values.imag)]


def transposed():
    values = torch.randn(4, 6)
    return [Parameter(values), Parameter(values.T)]


REFUSED = {
    "tied through .data": tied_through_data,
    "overlapping slices": lambda: slices(slice(0, 200), slice(100, None)),
    "one element": lambda: slices(slice(0, 200), slice(199, None)),
    "interleaved views with an element in common": lambda: slices(slice(0, None, 2), slice(0, None, 3)),
    "a slice inside of another": lambda: slices(slice(0, 300), slice(100, 101)),
    "complex and real": complex_and_its_real_view,
    "transposed": transposed,
    "the third one": lambda: [*slices(slice(0, 100), slice(150, 200)), *tied_through_data()],
}
REFUSED_ALONE = {
    "expanded": lambda: [Parameter(torch.randn(5, 1).expand(5, 3))],
    "windows": lambda: [Parameter(torch.randn(10).unfold(0, 4, 2))],
    "all in one place": lambda: [Parameter(torch.randn(1).as_strided((2, 2), (0, 0)))],
}
TAKEN = {
    "slices side by side": lambda: slices(slice(0, 100), slice(100, 300)),
    "every other element": lambda: slices(slice(0, None, 2), slice(1, None, 2)),
    "columns": lambda: [Parameter(column) for column in torch.randn(7, 3).split(1, dim=1)],
    "blocks of a matrix": lambda: [Parameter(part) for half in torch.randn(6, 8).split(3) for part in half.chunk(2, 1)],
    "nothing of a buffer": lambda: [*slices(slice(0, 300), slice(10, 10))],
    "a stride of 0 that takes no step": lambda: [Parameter(torch.randn(3).as_strided((1, 3), (0, 1)))],
    "channels last": lambda: [Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))],
    "real and imaginary parts": real_and_imaginary_parts,
}


def fill(params):
    for param in params:
        param.grad = torch.randn(param.shape, dtype=param.dtype)
    return params


@pytest.mark.parametrize("name", REFUSED | REFUSED_ALONE)
@either_backend
@every_optimizer
def test_shared_memory_is_refused_and_nothing_changes(name, backend, case):
    params = fill((REFUSED | REFUSED_ALONE)[name]())
    before = [param.detach().clone() for param in params]
    optimizer = case.make(params, backend=backend)
    with pytest.raises(RuntimeError, match="share memory"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert not any(optimizer.state.values())
    optimizer.eval()
    # Without the second one, or with memory of its own, training goes on.
    params[-1].data = params[-1].detach().clone()
    optimizer.step()
    assert all(len(optimizer.state[param]) > 2 for param in params)


@pytest.mark.parametrize("name", TAKEN)
@either_backend
@every_optimizer
def test_what_only_lies_close_is_taken(name, backend, case):
    """And trains as parameters in memory of their own do."""
    params = fill(TAKEN[name]())
    others = [Parameter(param.detach().clone()) for param in params]
    pair = [case.make(each, backend=backend) for each in (params, others)]
    for param, other in zip(params, others, strict=True):
        other.grad = param.grad.clone()
    for optimizer in pair:
        optimizer.step()
        optimizer.eval()
        optimizer.train()
        optimizer.step()
    assert all(map(torch.equal, params, others))


def test_the_message_names_both_and_says_what_to_do():
    a, b = tied_through_data()
    norm = Parameter(torch.ones(2))
    optimizer = XAdamW([{"params": [("lm_head.weight", a)]}, {"params": [("norm", norm), ("embed.weight", b)]}])
    fill([a, b, norm])
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    message = str(caught.value)
    assert "parameter 0 of group 0 (lm_head.weight), shape (40, 5)" in message
    assert "parameter 1 of group 1 (embed.weight), shape (40, 5)" in message
    assert "Tie the Parameter itself" in message


def test_a_tied_parameter_itself_is_one_parameter():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    optimizer = XAdamW(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()


def test_a_twin_without_a_gradient_may_stay():
    a, b = tied_through_data()
    a.grad = torch.ones_like(a)
    optimizer, alone = XAdamW([a, b]), XAdamW([other := Parameter(a.detach().clone())])
    other.grad = a.grad
    for each in (optimizer, alone):
        each.step()
        each.eval()
    assert torch.equal(a, other)


def test_one_that_joins_later_is_refused_too():
    a, b = tied_through_data()
    optimizer = XSGDM(fill([a]), lr=0.1)
    optimizer.step()
    before = a.detach().clone()
    optimizer.add_param_group({"params": fill([b])})
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.* and parameter 0 of group 1"):
        optimizer.step()
    assert torch.equal(a, before)
    optimizer.eval()  # the one that has state


def test_memory_that_is_shared_in_mid_training_is_refused_by_step_and_swap():
    a, b = fill([Parameter(torch.randn(4)), Parameter(torch.randn(4))])
    optimizer = XAdamW([a, b])
    optimizer.step()
    b.data = a.data
    for act in (optimizer.step, optimizer.eval):
        with pytest.raises(RuntimeError, match="share memory"):
            act()


def test_tensors_without_memory_are_not_compared():
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(torch.randn(3)) for _ in range(2)]
    assert shared_memory(fake) is None
    assert shared_memory([torch.empty(3, device="meta")] * 2) is None
    freed = [torch.randn(4), torch.randn(4)]
    for tensor in freed:
        tensor.untyped_storage().resize_(0)  # as FSDP does with what it gathered
    assert shared_memory(freed) is None
    assert shared_memory([torch.randn(3).to_sparse()] * 2) is None


views = st.tuples(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), max_size=3), st.integers(0, 20), st.sampled_from([4, 8])
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(views, min_size=1, max_size=4))
def test_any_views_of_one_buffer(descriptions):
    """Against the set of bytes that each element has."""
    buffer = torch.zeros(400, dtype=torch.float32)
    tensors, offsets = [], []
    for dimensions, start, width in descriptions:
        sizes, strides = [size for size, _ in dimensions], [stride for _, stride in dimensions]
        source = buffer.view({4: torch.float32, 8: torch.float64}[width])
        tensors.append(source.as_strided(sizes, strides, start))
        numbers = torch.arange(len(source)).as_strided(sizes, strides, start).reshape(-1).tolist()
        offsets.append([width * number + byte for number in numbers for byte in range(width)])
    has_twice = [len(set(own)) < len(own) for own in offsets]
    pairs = [(i, j) for j in range(len(offsets)) for i in range(j) if not set(offsets[i]).isdisjoint(offsets[j])]
    found = shared_memory(tensors)
    if any(has_twice):
        assert found is not None and found[0] == found[1] and has_twice[found[0]]
    else:
        assert found in pairs if pairs else found is None
