"""What users do to an optimizer, in any order, beside an oracle of each parameter (tests/oracle.py)."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from cases import PLAIN
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from interrupts import is_interrupted
from oracle import Oracle
from torch import nn
from twins import same_bits

import xgrad_optim

PACKAGE = str(Path(xgrad_optim.__file__).resolve().parent)
PRECISIONS = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "bfloat16-master": (torch.bfloat16, True),
}
SIZES = (1, 3, 8, 0, 33)


class Model(nn.Module):
    """Parameters, and a forward that shows them."""

    def __init__(self, tensors):
        super().__init__()
        self.weights = nn.ParameterList(tensors)

    def forward(self):
        return [weight.detach().clone() for weight in self.weights]


class Machine(RuleBasedStateMachine):
    """One optimizer and its model on the CPU; a subclass may choose another device, and back ends that serve it."""

    backends: tuple[str, ...] = ("torch", "cpu")
    device = "cpu"
    is_fused: bool | None = None

    @initialize(
        case=st.sampled_from(PLAIN),
        precision=st.sampled_from(sorted(PRECISIONS)),
        data=st.data(),
        n_params=st.integers(2, 4),
        prediction_steps=st.sampled_from([1.0, 2.5, 0.0]),
        attach=st.booleans(),
    )
    def begin(self, case, precision, data, n_params, prediction_steps, attach):
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
        self.case, (self.dtype, master_weights) = case, PRECISIONS[precision]
        self.model = Model([self.new_param(SIZES[i]) for i in range(n_params)])
        params = list(self.model.weights)
        backend = data.draw(st.sampled_from(self.backends))
        options = {"lr": 0.05, "prediction_steps": prediction_steps, "master_weights": master_weights}
        border = data.draw(st.integers(1, n_params - 1))
        groups = [{"params": params[:border]}, {"params": params[border:], "weight_decay": 0.1}]
        self.optimizer = case.make(groups, backend=backend, fused=self.is_fused, **options)
        self.oracles = {param: Oracle(case, param) for param in params}
        self.is_predicted, self.saved, self.is_attached = False, None, attach
        self.is_known = True  # not so where a copy, or what was loaded, has not run yet
        if attach:
            self.optimizer.attach(self.model)

    def new_param(self, size):
        return nn.Parameter(self.random(size))

    def random(self, size):
        return torch.randn(size, generator=self.generator, dtype=torch.float64).to(self.dtype).to(self.device)

    @property
    def groups(self):
        return self.optimizer.param_groups

    def listed(self):
        return [param for group in self.groups for param in group["params"]]

    def look(self, at_frozen=True):
        self.is_known = True
        for oracle in self.oracles.values():
            oracle.look(at_frozen)

    # -- steps and swaps ---------------------------------------------------------------------------------------------

    def is_pending(self):
        """Whether the next step or swap may find something that takes no more steps."""
        return self.is_reset() or any(oracle.is_frozen for oracle in self.oracles.values())

    def is_reset(self):
        return any(oracle.is_reset for oracle in self.oracles.values())

    def feed(self, mask):
        """Gradients for some of the parameters; what the oracle makes of them, once the step has run."""
        fed = []
        listed = [(group, param) for group in self.groups for param in group["params"]]
        for index, (group, param) in enumerate(listed):
            if mask >> index % 8 & 1 and param.requires_grad:
                param.grad = self.random(param.shape)
                fed.append((self.oracles[param], param.grad.cpu(), group))
        return fed

    def stepped(self, fed):
        self.look()
        for oracle, grad, group in fed:
            oracle.step(grad, group)
        for oracle in self.oracles.values():
            oracle.predict()
        self.is_predicted = True

    def zero_grad(self):
        for param in self.listed():
            param.grad = None

    @rule(mask=st.integers(0, 255))
    def step(self, mask):
        fed = self.feed(mask)
        self.optimizer.step()
        self.stepped(fed)
        self.zero_grad()

    @rule(mask=st.integers(0, 255), at=st.integers(0, 1500))
    def interrupted_step(self, mask, at):
        """Before, or after as a whole."""
        fed = self.feed(mask)
        before = copy.deepcopy([*self.oracles.values()])
        was_raised = is_interrupted(at, self.optimizer.step, lambda code: code.co_filename.startswith(PACKAGE))
        self.stepped(fed)
        self.zero_grad()
        self.swap(False)
        if was_raised and not self.is_as_expected():
            self.oracles = dict(zip(self.oracles, before, strict=True))
            self.swap(False)

    @rule(mask=st.integers(0, 255))
    def skipped_step(self, mask):
        """A GradScaler has found an inf. Nothing moves, but to theta: what takes no more steps, or all, by a switch."""
        fed, was_predicted = self.feed(mask), self.optimizer.predicted
        if self.is_fused and not all(oracle.has_state for oracle, _, _ in fed):
            self.zero_grad()  # the host takes a first step that only the device knows to be skipped for one
            return
        self.optimizer.found_inf = torch.ones((), device=self.device)
        self.optimizer.step()
        del self.optimizer.found_inf
        self.zero_grad()
        self.look()
        for oracle, _, group in fed if self.is_fused else ():  # such a step runs, and makes the state
            oracle.begin(group)
        self.is_predicted = was_predicted and self.optimizer.predicted

    @precondition(lambda self: self.device == "cpu")  # where torch has sparse tensors
    @rule(mask=st.integers(0, 255))
    def refused_step(self, mask):
        """Nothing has changed, but for what takes no more steps."""
        params = [param for param in self.listed() if param.requires_grad and param.numel()]
        if params:
            self.feed(mask)
            params[-1].grad = torch.ones_like(params[-1]).to_sparse()
            with pytest.raises(RuntimeError, match="sparse"):
                self.optimizer.step()
            self.zero_grad()
            self.swap(self.is_predicted)

    @rule(mode=st.booleans())
    def swap(self, mode):
        self.optimizer.train(mode)
        self.look()
        if mode:
            for oracle in self.oracles.values():
                oracle.predict()
        self.is_predicted = mode

    @rule(factor=st.sampled_from([None, 0.5, 1.5]), is_nested=st.booleans())
    def true_weights(self, factor, is_nested):
        was_predicted = self.is_predicted and any(oracle.has_state for oracle in self.oracles.values())
        with self.optimizer.true_weights():
            self.look()
            self.is_predicted = False
            assert self.is_as_expected()
            if is_nested:
                with self.optimizer.true_weights():
                    assert self.is_as_expected()
            if factor is not None:
                self.write(factor)
            assert self.is_as_expected()
        if was_predicted:
            self.is_predicted = True
            for oracle in self.oracles.values():
                oracle.predict()

    @precondition(lambda self: not self.is_predicted)
    @rule(factor=st.sampled_from([0.5, 1.25]))
    def write(self, factor):
        with torch.no_grad():
            for param, oracle in self.oracles.items():
                param.mul_(factor)
                oracle.write(param)

    @precondition(lambda self: self.is_attached)
    @rule(is_training=st.booleans(), call=st.booleans())
    def forward(self, is_training, call):
        looks = is_training or self.optimizer._exchange.mode is not False  # else theta is in place, for all it knows
        self.model.train(is_training)
        if not is_training:
            if looks:
                self.look()
            self.is_predicted = False
            assert self.is_as_expected()
        if call and not (is_training and self.is_reset()):  # a forward that finds theta_hat in place looks no further
            seen = self.model()
            if looks:
                self.look(at_frozen=not is_training)
            self.is_predicted = is_training
            for oracle in self.oracles.values():
                if is_training:
                    oracle.predict()
            assert self.is_as_expected()
            assert all(map(same_bits, seen, self.model.weights))

    # -- options ---------------------------------------------------------------------------------------------------

    @rule(index=st.integers(0, 9), lr=st.sampled_from([0.1, 0.01, 0.0]), s=st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    def schedule(self, index, lr, s):
        group = self.groups[index % len(self.groups)]
        group["lr"], group["prediction_steps"] = lr, s

    @rule(index=st.integers(0, 9), name=st.sampled_from(["maximize", "amsgrad", "master_weights"]))
    def switch(self, index, name):
        group = self.groups[index % len(self.groups)]
        if name in group:
            group[name] = not group[name]

    @rule(index=st.integers(0, 9), which=st.integers(0, 9))
    def choose_backend(self, index, which):
        self.groups[index % len(self.groups)]["backend"] = self.backends[which % len(self.backends)]

    # -- groups and parameters -------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.oracles) < 7)
    @rule(size=st.sampled_from(SIZES))
    def add_group(self, size):
        param = self.new_param(size)
        self.model.weights.append(param)
        self.optimizer.add_param_group({"params": [param], "lr": 0.02})
        self.oracles[param] = Oracle(self.case, param)

    @precondition(lambda self: len(self.groups) > 1 and self.is_known and not self.is_attached)
    @rule(mode=st.booleans(), keeps_state=st.booleans())
    def remove_group(self, mode, keeps_state):
        removed = self.groups.pop()["params"]
        if not keeps_state:
            for param in removed:
                self.optimizer.state.pop(param, None)
        gone = {param: self.oracles.pop(param) for param in removed}
        for oracle in gone.values():
            oracle.look()
        self.swap(mode)
        for param in removed:
            self.optimizer.state.pop(param, None)
        assert all(same_bits(param.cpu(), oracle.held(False)) for param, oracle in gone.items())
        self.saved = None

    @precondition(lambda self: len(self.groups) > 1)
    @rule(giver=st.integers(0, 9), taker=st.integers(0, 9), is_last=st.booleans())
    def move(self, giver, taker, is_last):
        """Of the last of one group and the first of the next, the order of all parameters stays the same."""
        giver, taker = self.groups[giver % len(self.groups)], self.groups[taker % len(self.groups)]
        if len(giver["params"]) > 1:
            taker["params"].insert(0 if is_last else len(taker["params"]), giver["params"].pop(-is_last))
            self.saved = None

    @rule(index=st.integers(0, 9), is_frozen=st.booleans())
    def freeze(self, index, is_frozen):
        param = self.listed()[index % len(self.oracles)]
        param.requires_grad_(not is_frozen)
        self.oracles[param].is_frozen = is_frozen

    # -- state -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.is_known)
    @rule(index=st.integers(0, 9), how=st.sampled_from(["pop", "clear", "all", "same"]))
    def reset(self, index, how):
        param, state = self.listed()[index % len(self.oracles)], self.optimizer.state
        if how == "same":
            if param in state:
                state[param] = {key: value.clone() for key, value in state[param].items()}
            return
        if how == "all":
            state.clear()
        elif how == "pop":
            state.pop(param, None)
        elif param in state:
            state[param].clear()
        for one in self.oracles if how == "all" else [param]:
            self.oracles[one].is_reset = self.oracles[one].has_state

    @rule(index=st.integers(0, 9))
    def zero_momentum(self, index):
        """At theta, where nothing has to be undone with it."""
        self.swap(False)
        param = self.listed()[index % len(self.oracles)]
        if self.oracles[param].has_state:
            self.optimizer.state[param][self.optimizer.rule.state_keys[0]].zero_()
            self.oracles[param].zero_momentum()

    @rule()
    def save(self):
        if self.is_attached:
            self.swap(False)  # what is saved holds theta
        if not self.is_pending():
            state_dict = copy.deepcopy(self.optimizer.state_dict())
            weights = [param.detach().clone() for param in self.oracles]
            self.saved = state_dict, weights, copy.deepcopy([*self.oracles.values()]), self.is_predicted

    @precondition(lambda self: self.saved is not None and len(self.saved[1]) == len(self.oracles))
    @rule()
    def load(self):
        state_dict, weights, oracles, self.is_predicted = copy.deepcopy(self.saved)
        if self.is_attached:
            self.swap(False)
            self.is_predicted = False
        with torch.no_grad():
            for param, weight in zip(self.oracles, weights, strict=True):
                param.copy_(weight)
        self.optimizer.load_state_dict(state_dict)
        self.is_known = False
        for param, oracle in zip(self.oracles, oracles, strict=True):
            self.oracles[param] = oracle
            oracle.is_frozen = not param.requires_grad

    @precondition(lambda self: self.device == "cpu" and not self.is_attached and not self.is_pending())
    @rule(is_pickled=st.booleans())
    def replace_by_a_copy(self, is_pickled):
        params, everything = list(self.oracles), (self.model, self.optimizer, list(self.oracles))
        copied = pickle.loads(pickle.dumps(everything)) if is_pickled else copy.deepcopy(everything)
        self.model, self.optimizer, others = copied
        self.oracles = {other: self.oracles[param] for param, other in zip(params, others, strict=True)}
        self.is_known = False

    # -- what must hold --------------------------------------------------------------------------------------------

    def is_as_expected(self):
        state = self.optimizer.state
        return all(
            same_bits(param.cpu(), oracle.held(self.is_predicted))
            and int(state.get(param, {}).get("step", 0)) == oracle.n_steps
            for param, oracle in self.oracles.items()
        )

    @invariant()
    def holds_the_weights_of_its_mode(self):
        if hasattr(self, "oracles"):
            assert self.is_as_expected()

    def teardown(self):
        if hasattr(self, "oracles"):
            self.swap(False)
            assert self.is_as_expected()


CI_EXAMPLES = 2000


def run_machine(machine, n_examples):
    """So many sequences; the first that goes wrong is shortened and shown."""
    options = settings(
        max_examples=n_examples,
        stateful_step_count=25,
        deadline=None,
        derandomize=n_examples <= CI_EXAMPLES,  # CI says the same of the same sources; longer runs look for more
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(machine, settings=options)
