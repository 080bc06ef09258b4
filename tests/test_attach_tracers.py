"""Inside a tracer, a fake mode or a transform a swap runs outside of it, and a step says that it can't run there.

A recorded swap runs again with every call of the graph, over raw addresses; a faked or transformed one does not reach
the weights, but is noted. Weights that the caller hands in are the caller's business.
"""

import copy

import pytest
import torch
from attached import X, attached, both_weights, equal, set_mode
from cases import loss_of, small_model, train_step
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from training import clones

from xgrad_optim import XAdamW

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, of its own tracers
either_backend = pytest.mark.parametrize("backend", ["torch", None])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def export(model, **options):
    return torch.export.export(model, (X,), **options).module()(X)


def fake(model):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return model(torch.empty(X.shape))


def in_mode(mode):
    def forward(model):
        with mode:
            return model(X)

    return forward


def traced(model, **options):
    """What a graph computes that has run before, and is that of a model without an optimizer."""
    graph, plain = (make_fx(each.__call__, **options)(X) for each in (model, small_model(torch.float32)))
    assert [node.target for node in graph.graph.nodes] == [node.target for node in plain.graph.nodes]
    graph(X)
    return graph(X)


def jit_traced(model):
    graph, plain = (torch.jit.trace(each, X) for each in (model, small_model(torch.float32)))
    kinds, plain_kinds = ([node.kind() for node in each.inlined_graph.nodes()] for each in (graph, plain))
    assert kinds == plain_kinds
    graph(X)
    return graph(X)


class Watching(TorchDispatchMode):
    """As a profiler of the user's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


FORWARDS = {
    "export": export,
    "jit.trace": jit_traced,
    "make_fx": traced,
    "make_fx before dispatch": lambda model: traced(model, pre_dispatch=True),
    "symbolic_trace": lambda model: torch.fx.symbolic_trace(model)(X),
    "jacrev": lambda model: (jacrev(model)(X[0]), model(X))[1],
    "jacfwd": lambda model: (jacfwd(model)(X[0]), model(X))[1],
    "hessian": lambda model: (jacfwd(jacrev(lambda x: model(x).sum()))(X[0]), model(X))[1],
    "vmap": lambda model: vmap(model)(X),
    "jvp": lambda model: jvp(model, (X,), (X,))[0],
    "vjp": lambda model: vjp(model, X)[0],
    "functionalize": lambda model: torch.func.functionalize(model)(X),
    "autograd's jacobian": lambda model: (torch.autograd.functional.jacobian(model, X[0]), model(X))[1],
    "a device": in_mode(torch.device("meta")),
    "a mode of the user": in_mode(Watching()),
    "inference": lambda model: torch.inference_mode()(model)(X),
    "compile": lambda model: torch.compile(model, backend="aot_eager")(X),
}


@either_backend
@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS.keys())
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_a_swap_inside_runs_outside(backend, forward, mode):
    model, optimizer = attached(backend=backend)
    weights = dict(zip((False, True), both_weights(optimizer), strict=True))
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for param, value in zip(expected.parameters(), weights[mode], strict=True):
            param.copy_(value)
    optimizer.train(not mode)
    set_mode(model, mode)
    output = forward(model)
    assert torch.allclose(output, expected.train(mode)(X), rtol=0, atol=1e-6)
    assert optimizer.predicted is mode and equal(model.parameters(), weights[mode])
    for again in (True, False):
        optimizer.train(again)
        assert equal(model.parameters(), weights[again]), "and nothing was noted that did not happen"
    train_step(model, optimizer, 3)


def swap_twice(model, optimizer):
    with optimizer.true_weights():
        assert not optimizer.predicted
    assert optimizer.predicted
    optimizer.train(False)


@either_backend
@pytest.mark.parametrize(
    "act",
    [
        lambda model, optimizer: model.eval(),
        lambda model, optimizer: optimizer.eval(),
        lambda model, optimizer: model.state_dict(keep_vars=True),
        lambda model, optimizer: optimizer.state_dict(),
        lambda model, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
        swap_twice,
    ],
    ids=["model.eval", "eval", "state_dict", "optimizer.state_dict", "load_state_dict", "true_weights"],
)
@pytest.mark.parametrize("inside", ["FakeTensorMode", "make_fx", "vmap", "jit.trace"])
def test_every_entrance_works_inside(backend, act, inside):
    model, optimizer = attached(backend=backend)
    theta, theta_hat = both_weights(optimizer)

    def function(x):
        act(model, optimizer)
        return x * 2

    if inside == "FakeTensorMode":
        with FakeTensorMode():
            act(model, optimizer)
            assert not optimizer.predicted
    elif inside == "make_fx":
        graph = make_fx(function)(X)
        assert len(graph.graph.nodes) == 3
    elif inside == "vmap":
        vmap(function)(X)
    else:
        torch.jit.trace(function, X, check_trace=False)
    assert equal(model.parameters(), theta)
    optimizer.train()
    assert equal(model.parameters(), theta_hat)


@either_backend
@pytest.mark.parametrize("inside", ["FakeTensorMode", "make_fx", "make_fx early", "vmap", "grad", "jit.trace"])
def test_a_step_inside_says_so_and_changes_nothing(backend, inside):
    model, optimizer = attached(backend=backend)
    loss_of(model, 3).backward()
    before, steps = clones(model.parameters()), optimizer.state[model[0].weight]["step"].clone()

    def function(x):
        optimizer.step(lambda: pytest.fail("the closure was called"))
        return x.sum()

    with pytest.raises(RuntimeError, match=r"XAdamW.step\(\) was called inside .*Nothing was changed"):
        if inside == "FakeTensorMode":
            with FakeTensorMode(allow_non_fake_inputs=True):
                function(X)
        elif inside == "vmap":
            vmap(function)(X)
        elif inside == "grad":
            grad(function)(X)
        elif inside == "jit.trace":
            torch.jit.trace(function, X)
        else:
            make_fx(function, pre_dispatch=inside != "make_fx")(X)
    assert equal(model.parameters(), before) and optimizer.state[model[0].weight]["step"] == steps
    optimizer.step()


@either_backend
@pytest.mark.parametrize("mode", [Watching(), torch.device("cpu")], ids=["dispatch", "device"])
def test_modes_that_only_watch_may_watch_a_step(backend, mode):
    models = [attached(backend=backend) for _ in range(2)]
    for model, optimizer in models:
        loss_of(model, 3).backward()
        if optimizer is models[0][1]:
            with mode:
                optimizer.step()
        else:
            optimizer.step()
    assert equal(models[0][0].parameters(), models[1][0].parameters())


@pytest.mark.parametrize("compiler", ["compile", "export"])
def test_where_no_graph_may_be_broken_the_error_says_what_to_do(compiler):
    model, optimizer = attached()
    theta, theta_hat = both_weights(optimizer)
    set_mode(model, False)

    def run():
        if compiler == "export":
            return export(model, strict=True)
        return torch.compile(model, backend="eager", fullgraph=True)(X)

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call model.eval\(\) or optimizer.eval\(\)"):
        run()
    assert equal(model.parameters(), theta_hat)
    torch._dynamo.reset()
    model.eval()
    output = run()
    assert torch.equal(output, model(X)) and equal(model.parameters(), theta)


def test_parts_of_another_mode_inside_a_compiled_model_break_no_graph():
    """A frozen BatchNorm: dynamo inlines the forward that calls it, which is on no stack then."""
    model, optimizer = attached(model=nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)))
    twin = copy.deepcopy(model)
    twin_optimizer = XAdamW(twin.parameters(), lr=0.01)
    twin_optimizer.load_state_dict(optimizer.state_dict())
    twin_optimizer.attach(twin)
    model(X), twin(X)
    model[1].eval(), twin[1].eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(3):
        for each, of in ((compiled, optimizer), (twin, twin_optimizer)):
            of.zero_grad()
            each(X).square().mean().backward()
            of.step()
        assert optimizer.predicted
    assert equal(model.parameters(), twin.parameters())


def test_a_compiled_part_in_a_mode_of_its_own():
    model, optimizer = attached()
    theta, theta_hat = both_weights(optimizer)
    whole, part = torch.compile(model, backend="eager"), torch.compile(model[0], backend="eager")
    for _ in range(2):
        whole.train()(X)
        for mode, weights in ((False, theta), (True, theta_hat)):
            set_mode(model[0], mode)
            assert torch.equal(part(X), nn.functional.linear(X, *weights[:2]))


# -- weights that the caller hands in --------------------------------------------------------------------------------


def per_sample_gradients(model):
    params = {name: param.detach() for name, param in model.named_parameters()}
    return vmap(grad(lambda p, x: functional_call(model, p, (x,)).square().sum()), (None, 0))(params, X)


def inner_loop(model):
    """MAML's: a step on clones, whose graph reaches the parameters."""
    fast = {name: param.clone() for name, param in model.named_parameters()}
    grads = torch.autograd.grad(functional_call(model, fast, (X,)).square().mean(), fast.values(), create_graph=True)
    faster = {name: value - 0.1 * step for (name, value), step in zip(fast.items(), grads, strict=True)}
    functional_call(model, faster, (X,)).square().mean().backward()


def weights_of_another(model):
    return functional_call(model, dict(small_model(torch.float32, seed=3).named_parameters()), (X,))


handed_in = pytest.mark.parametrize("use", [per_sample_gradients, inner_loop, weights_of_another])


@handed_in
@pytest.mark.parametrize("steps", [0, 3])
def test_weights_that_are_handed_in_need_no_owner(use, steps):
    """Also where no ordinary forward has come before."""
    model, optimizer = attached(steps=steps)
    use(model)
    model.zero_grad()
    train_step(model, optimizer, steps)


@handed_in
def test_weights_that_are_handed_in_move_no_others(use):
    model, optimizer = attached()
    theta, _ = both_weights(optimizer)
    optimizer.eval()
    use(model)
    assert equal(model.parameters(), theta) and not optimizer.predicted


def test_weights_of_which_some_are_handed_in_leave_the_rest_to_the_mode():
    model, optimizer = attached()
    theta, _ = both_weights(optimizer)
    set_mode(model, False)
    own = torch.zeros(3)
    output = functional_call(model, {"2.bias": own}, (X,))
    assert torch.equal(output, functional_call(small_model(torch.float32), named(model, [*theta[:3], own]), (X,)))


def named(model, weights):
    return dict(zip(dict(model.named_parameters()), weights, strict=True))


# -- in a backward ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_frozen_part_that_is_recomputed_sees_what_its_first_forward_saw(use_reentrant):
    """It is the outermost module that runs there, and in another mode than the model."""
    norm = nn.BatchNorm1d(5)
    model = nn.Sequential(nn.Linear(5, 5), norm)
    optimizer = XAdamW(model.parameters(), lr=0.01)
    optimizer.attach(model)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return checkpoint(norm, model[0](x), use_reentrant=use_reentrant)

    whole = Model()
    optimizer.attach(whole)
    for _ in range(3):
        optimizer.zero_grad()
        norm.eval()
        whole(X).square().mean().backward()
        assert optimizer.predicted or not optimizer.state
        optimizer.step()
