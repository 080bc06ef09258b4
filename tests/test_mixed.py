"""Whatever shares a launch with a parameter, it is moved as if it were alone.

What can break is all that is per launch where it is meant per parameter: rows of parameters that joined late or missed
a step and stand between others, state of two widths, one tensor that no kernel takes behind many that it does, bundles
and blocks of the torch back end, groups whose options differ. Each parameter has a twin in an optimizer of its own; all
that they hold is compared bit by bit after every move.
"""

from typing import NamedTuple

import pytest
import torch
from cases import PLAIN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twins import needs_library, same_bits

from xgrad_optim.backends import torch as torch_backend

LAYOUTS = {
    "contiguous": lambda flat: flat,
    "misaligned": lambda flat: torch.cat([flat[:1], flat])[1:] if len(flat) else flat,
    "transposed": lambda flat: flat.reshape(-1, 3).t() if len(flat) % 3 == 0 else flat,
    "with gaps": lambda flat: flat.repeat_interleave(2)[::2],
}
GROUPS = (
    {"lr": 0.1},
    {"lr": 0.01, "prediction_steps": 2.5, "weight_decay": 0.1},
    {"lr": 0.1, "prediction_steps": 0.0, "maximize": True},
)
MOVES = ("step", "step", "step", "skipped step", "eval", "train", "widen", "true weights")


class Kind(NamedTuple):
    """One parameter: how it lies in memory, what its group says, and in which steps (bits) it has a gradient."""

    numel: int
    dtype: torch.dtype
    layout: str
    group: int
    master_weights: bool
    takes_part: int

    def made(self, seed: int) -> torch.nn.Parameter:
        values = torch.randn(self.numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return torch.nn.Parameter(LAYOUTS[self.layout](values.to(self.dtype)))

    @property
    def options(self):
        return {**GROUPS[self.group], "master_weights": self.master_weights}


kinds = st.builds(
    Kind,
    numel=st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65, 300]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float64]),
    layout=st.sampled_from(["contiguous", "contiguous", *LAYOUTS]),
    group=st.integers(0, len(GROUPS) - 1),
    master_weights=st.booleans(),
    takes_part=st.sampled_from([255, 255, 255, 254, 252, 170]) | st.integers(1, 255),
)


def widen(optimizer):
    """Float32 state for 16-bit parameters, as fused mixed precision has it."""
    for state in optimizer.state.values():
        for key in optimizer.rule.state_keys:
            state[key] = state[key].to(torch.promote_types(state[key].dtype, torch.float32))


def clamp(optimizer):
    with optimizer.true_weights(), torch.no_grad():
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.clamp_(-1, 1)


def skip(optimizer):
    """A GradScaler has found an inf."""
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    del optimizer.found_inf


ACTS = {
    "step": lambda optimizer: optimizer.step(),
    "skipped step": skip,
    "eval": lambda optimizer: optimizer.eval(),
    "train": lambda optimizer: optimizer.train(),
    "widen": widen,
    "true weights": clamp,
}


def held(optimizer, param):
    state = {"param": param, **optimizer.state.get(param, {})}
    if "predicted" in state:  # where both weights are one, either mode is right
        state["predicted"] = state["predicted"] * (state["prediction_shift"] != 0)
    return state


@needs_library
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_parameter_moves_as_if_alone(backend, monkeypatch):
    monkeypatch.setattr(torch_backend, "SMALL", 16)
    monkeypatch.setattr(torch_backend, "BLOCK_BYTES", 256)

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=st.sampled_from(PLAIN), kinds=st.lists(kinds, min_size=2, max_size=7), data=st.data())
    def run(case, kinds, data):
        together = [kind.made(index) for index, kind in enumerate(kinds)]
        alone = [kind.made(index) for index, kind in enumerate(kinds)]
        groups = [{"params": [param], **kind.options} for kind, param in zip(kinds, together, strict=True)]
        if data.draw(st.booleans(), "one group"):
            groups = [{"params": together, **kinds[0].options}]
        optimizer = case.make(groups, backend=backend)
        singles = [
            case.make([{**group, "params": [twin]}], backend=backend)
            for twin, group in zip(alone, groups if len(groups) > 1 else groups * len(alone), strict=True)
        ]
        n_steps = 0
        for move in data.draw(st.lists(st.sampled_from(MOVES), min_size=3, max_size=8), "moves"):
            if "step" in move:
                for kind, param, twin in zip(kinds, together, alone, strict=True):
                    has_grad = kind.takes_part >> n_steps % 8 & 1
                    param.grad = torch.randn_like(param) if has_grad else None
                    twin.grad = param.grad.clone() if has_grad else None
                n_steps += 1
            for each in (optimizer, *singles):
                ACTS[move](each)
            for index, (param, twin, single) in enumerate(zip(together, alone, singles, strict=True)):
                ours, theirs = held(optimizer, param), held(single, twin)
                assert ours.keys() == theirs.keys()
                assert not [name for name in ours if not same_bits(ours[name], theirs[name])], (move, index)

    run()
