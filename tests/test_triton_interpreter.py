"""The Triton kernel under Triton's interpreter, on CPU tensors through their addresses, equals the CPU back end.

The same equality as in the simulation, without a compiler in between: what differs here is the kernel's text.
"""

import numpy
import pytest
import torch
from cases import PLAIN, every_optimizer
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode
from twins import Twins, launches, needs_library, train

pytest.importorskip("triton", reason="the Triton back end needs the package triton")
import triton.runtime.interpreter
from triton_kernels import convert_float, interpreted_kernels, multi_tensor

from xgrad_optim import XAdamW, available_backends
from xgrad_optim import launch as launch_module

pytestmark = [
    needs_library,
    # numpy warns where a GPU does not: inf - inf, and 0 / 0 in the direction of a prediction that there is not yet.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(
        Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"),
        reason="triton 3.6 interprets one-element arrays as numbers, which numpy from 2.4 on refuses",
    ),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (0, 3, 85)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch) -> None:
    """Blocks and chunks are small: the interpreter takes long for one program, however small its work."""
    kernels = interpreted_kernels()
    monkeypatch.setattr(multi_tensor, "multi_tensor_kernel", kernels.multi_tensor_kernel)
    monkeypatch.setattr(multi_tensor, "RULES", kernels.RULES)
    monkeypatch.setattr(multi_tensor, "BLOCK_BYTES", 64)
    monkeypatch.setattr(launch_module, "CHUNK", 64)
    monkeypatch.setattr(triton.runtime.interpreter, "_convert_float", convert_float)


def triton_twins(make, tensors, **options) -> Twins:
    return Twins(make, tensors, names=("cpu", "triton"), **options)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in PLAIN for dtype in DTYPES if dtype == torch.float32 or case.optimizer is XAdamW],
    ids=lambda value: getattr(value, "id", str(value)),
)
def test_equals_the_cpu_back_end(case, dtype):
    """Every pair of options at least once; the dtypes with one rule, for the others go through the simulation."""
    tensors = [torch.randn(size, dtype=dtype) for size in SIZES]
    combinations = ((1, False, False, True), (2.5, True, False, False), (0, False, True, False), (1, True, True, True))
    for s, master, amsgrad, ascend in combinations:
        options = {"prediction_steps": s, "master_weights": master, "maximize": ascend, "lr": 0.02}
        options["weight_decay"] = 0.1 if ascend != master else 0
        if case.takes("amsgrad"):
            options["amsgrad"] = amsgrad
        if case.takes("decoupled_weight_decay"):
            options["decoupled_weight_decay"] = not ascend
        if case.takes("momentum"):
            options["momentum"] = 0.0 if master and not ascend else 0.9
        if case.takes("dampening"):
            options["dampening"] = 0.3 if ascend else 0
        train(triton_twins(case.make, tensors, **options), tensors, steps=3)


def test_groups_and_skipped_gradients_have_rows_of_their_own():
    tensors = [torch.randn(70) for _ in range(3)]

    def make(params, **options):
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "prediction_steps": 3, "weight_decay": 0.2}]
        return XAdamW(groups, **options)

    twins = triton_twins(make, tensors)
    for step in range(3):
        twins.step([None if step == index else torch.randn(70) for index in range(3)])


@every_optimizer
def test_special_numbers(case):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-40, 3e38, 1e-20, 1.0])
    pairs = torch.cartesian_prod(special, special)
    twins = triton_twins(case.make, [pairs[:, 0].contiguous()], lr=0.1)
    for grad in (pairs[:, 1], pairs[:, 0].flip(0), torch.zeros(100)):
        twins.step([grad.contiguous()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128], ids=str)
def test_layouts(dtype):
    storage = torch.randn(150, dtype=dtype)
    flat = [storage[1:34], storage[40:101], torch.randn(6, 7, dtype=dtype).t()]
    gaps = [torch.randn(8, 10, dtype=dtype)[:, ::2]]
    twins = triton_twins(XAdamW, flat + gaps)
    train(twins, flat + gaps, steps=2)


def test_it_is_available_only_for_what_it_can_run():
    assert available_backends()["triton"] is None
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    param.grad = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match="triton: parameters are on meta"):
        XAdamW([param], backend="triton").step()


def test_fake_tensors_have_no_addresses():
    real = torch.nn.Parameter(torch.ones(3))
    real.grad = torch.ones(3)
    optimizer = XAdamW([real], backend="triton")
    optimizer.step()
    (launch,) = launches(optimizer)
    assert multi_tensor.why_not(launch) is None
    with FakeTensorMode():
        launch.params = [torch.ones(3)]
    assert multi_tensor.why_not(launch) == "a FakeTensor has no memory of its own"
