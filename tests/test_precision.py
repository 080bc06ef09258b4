"""The recipes of the table on precision in docs/options.md: each trains, and takes the memory that the table says.

Memory is measured from the tensors that training leaves in parameters, gradients and state; torch.optim's beside it, in
the recipe that does the same. What 16-bit weights lose, and master weights keep, is measured too.
"""

from pathlib import Path

import pytest
import torch
from cases import every_optimizer
from family import FAMILY

PAGE = (Path(__file__).parent.parent / "docs" / "options.md").read_text(encoding="utf-8")
RECIPES = {
    "float32": (torch.float32, False, False),
    "float32, autocast to bfloat16": (torch.float32, True, False),
    "bfloat16, `master_weights=True`": (torch.bfloat16, False, True),
    "bfloat16": (torch.bfloat16, False, False),
}


def build(dtype):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64)).to(dtype)


def train(model, optimizer, autocast=False, steps=20):
    """Fit one fixed batch. Returns the losses."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 32, 64, generator=generator).to(next(model.parameters()).dtype)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = torch.nn.functional.mse_loss(model(x).float(), y.float())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def bytes_per_element(model, optimizer):
    """Of parameters, gradients and state; the few numbers beside them, which have no elements, left out."""
    tensors = []
    for param in model.parameters():
        tensors += [param, param.grad, *(value for value in optimizer.state[param].values() if value.dim())]
    return sum(tensor.nbytes for tensor in tensors) / sum(param.numel() for param in model.parameters())


def table_cell(recipe, name):
    """The table's number of a recipe, in the column of this class."""
    rows = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith(f"| {recipe} |")]
    assert len(rows) == 1, f"the page has no row for {recipe}"
    (header,) = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| precision |")]
    columns = [index for index, classes in enumerate(header) if f"`{name}`" in classes]
    assert len(columns) == 1, f"the table has no column of {name}, or two"
    return rows[0][columns[0]].strip()


@every_optimizer
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_in_the_memory_that_the_table_says(case, recipe):
    dtype, autocast, master_weights = RECIPES[recipe]
    model = build(dtype)
    optimizer = case.make(model.parameters(), lr=0.002, master_weights=master_weights)
    losses = train(model, optimizer, autocast)
    assert losses[-1] < losses[0]
    assert table_cell(recipe, case.optimizer.__name__) == f"{bytes_per_element(model, optimizer):g}"


@pytest.mark.parametrize("member", [member for member in FAMILY if member.is_base], ids=lambda m: m.like.__name__)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_table_says_what_torch_takes(member, recipe):
    dtype, autocast, master_weights = RECIPES[recipe]
    expected = "-"  # torch.optim has no master weights
    if not master_weights:
        model = build(dtype)
        optimizer = member.make_base(model.parameters(), lr=0.002)
        train(model, optimizer, autocast)
        expected = f"{bytes_per_element(model, optimizer):g}"
    assert table_cell(recipe, member.like.__name__) == expected


@every_optimizer
def test_master_weights_keep_the_updates_that_bfloat16_loses(case):
    """A step far below the spacing of bfloat16 moves no pure bfloat16 weight, ever; in master weights it adds up."""
    moved = {}
    for recipe in ("float32", "bfloat16", "bfloat16, `master_weights=True`"):
        dtype, _, master_weights = RECIPES[recipe]
        param = torch.nn.Parameter(torch.ones(100, dtype=dtype))
        optimizer = case.make([param], lr=1e-4, weight_decay=0.0, master_weights=master_weights)
        for _ in range(200):
            param.grad = torch.full_like(
                param, 1.0 if case.takes("eps") else 0.1
            )  # what divides by the gradient's size
            optimizer.step()
        with optimizer.true_weights():
            moved[recipe] = 1 - param.float().mean().item()
    assert moved["bfloat16"] == 0
    assert moved["bfloat16, `master_weights=True`"] == pytest.approx(moved["float32"], abs=2**-8)
    assert moved["float32"] > 2**-9


def test_the_table_names_no_other_recipe():
    rows = PAGE.split("| precision |")[1].split("\n\n")[0].splitlines()[2:]
    assert {row.split("|")[1].strip() for row in rows} == RECIPES.keys()
