"""The Triton back end's PTX, executed without a GPU, equals the CPU back end in every bit and moves the least bytes.

Equality can break where the compiler contracts or reorders operations, by a rounding to 16 bits, at the ragged end of a
chunk, at misaligned addresses, and where a thread touches memory that is nobody's.
"""

import mmap

import numpy
import pytest
import torch
from cases import every_case, every_optimizer
from twins import Twins, needs_library, train

pytest.importorskip("triton", reason="the Triton back end needs the package triton")
from simulation import bytes_moved, check_traffic, needs_simulator, ptxsim
from triton_kernels import SimulatedKernel, load_kernel, multi_tensor

from xgrad_optim import XSGDM, XAdam, XAdamW
from xgrad_optim import launch as launch_module

pytestmark = [needs_simulator, needs_library]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
CHUNK = 2048
UNTOUCHED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE of Linux: pages cost nothing until written
SIZES = (0, 1, 3, CHUNK - 1, CHUNK, CHUNK + 1, 5000)


@pytest.fixture(autouse=True)
def simulated(monkeypatch) -> SimulatedKernel:
    """Everything that runs on the Triton back end runs in the simulator, and is checked for what it touched."""
    monkeypatch.setattr(launch_module, "CHUNK", CHUNK)
    kernel = SimulatedKernel()
    monkeypatch.setattr(multi_tensor, "multi_tensor_kernel", kernel)
    yield kernel
    assert kernel.simulator.runs
    for stats in kernel.simulator.runs:
        check_traffic(stats)


def triton_twins(make, tensors, **options) -> Twins:
    return Twins(make, tensors, names=("cpu", "triton"), **options)


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_cpu_back_end(case, dtype):
    tensors = [torch.randn(shape, dtype=dtype) for shape in ((), (0,), (3,), (17, 5), (1024,), (1500,))]
    for steps, master in ((0, False), (1, False), (2.5, True)):
        train(triton_twins(case.make, tensors, prediction_steps=steps, master_weights=master), tensors)


@pytest.mark.parametrize("architecture", [80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_architectures_convert_alike(dtype, architecture, monkeypatch):
    """Each has its own instructions for 16 bits."""
    monkeypatch.setattr(multi_tensor.multi_tensor_kernel, "architecture", architecture)
    tensors = [torch.randn(1500, dtype=dtype)]
    train(triton_twins(XAdamW, tensors), tensors)


@every_optimizer
def test_sizes_around_a_chunk(case):
    tensors = [torch.randn(size) for size in SIZES]
    train(triton_twins(case.make, tensors), tensors)


@every_optimizer
def test_groups_and_skipped_gradients_have_rows_of_their_own(case, simulated):
    tensors = [torch.randn(1100) for _ in range(4)]

    def make(params, **options):
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "prediction_steps": 3, "weight_decay": 0.2}]
        return case.make(groups, **options)

    twins = triton_twins(make, tensors)
    for step in range(5):
        twins.step([None if step == index else torch.randn(1100) for index in range(4)])
    assert len(set(twins.optimizers["triton"]._cache.launches[0].row_of)) > 1


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_special_numbers(case, dtype):
    """NaN stays in its element, infinities and subnormals take the same way in both, in whole blocks and in tails."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-40, 3e38, 1e-20, 1.0])
    pairs = torch.cartesian_prod(special, special).repeat(11, 1)
    twins = triton_twins(case.make, [pairs[:, 0].to(dtype).contiguous()], lr=0.1)
    for grad in (pairs[:, 1], pairs[:, 0].flip(0), torch.zeros(len(pairs))):
        twins.step([grad.to(dtype).contiguous()])
        twins.do(lambda optimizer: optimizer.eval())
        twins.do(lambda optimizer: optimizer.train())
    finite = triton_twins(case.make, [torch.ones(40, dtype=dtype)])
    grad = torch.full((40,), float("nan")).where(torch.arange(40) == 33, torch.ones(40))
    finite.step([grad.to(dtype)])
    assert finite.params["triton"][0].isnan().nonzero().tolist() == [[33]]


def test_a_nan_stays_in_the_running_maximum():
    twins = triton_twins(XAdam, [torch.randn(600)], amsgrad=True)
    twins.step([torch.randn(600)])
    for optimizer in twins.optimizers.values():
        for state in optimizer.state.values():
            state["max_exp_avg_sq"][[3, 599]] = float("nan")
    twins.step([torch.randn(600)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_and_tie_is_converted_as_torch_does(dtype):
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    twins = triton_twins(XSGDM, [halves], lr=1.0, momentum=0.5, dampening=0.25)
    twins.step([halves.flip(0)])
    between = halves.float() * torch.linspace(0.9, 1.1, halves.numel())
    edges = torch.tensor([65519.0, 65520.0, 65535.9, 2.0**-25, 2.0**-24, 1.5 * 2.0**-24, 6.1e-5, 3.3e38, 3.4e38, 1e-41])
    master = triton_twins(XSGDM, [torch.zeros(halves.numel() + 10, dtype=dtype)], lr=1.0, master_weights=True)
    master.step([torch.zeros(halves.numel() + 10, dtype=dtype)])
    for name, params in master.params.items():
        master.optimizers[name].state[params[0]]["momentum_buffer"].copy_(torch.cat((between, edges)))
    master.do(lambda optimizer: optimizer.eval())
    master.do(lambda optimizer: optimizer.train())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_layouts(dtype, monkeypatch):
    """Views at odd offsets and permuted but dense tensors run in the kernel, the others on the torch back end."""
    storage = torch.randn(5000, dtype=dtype)
    flat = [storage[1:1101], storage[1200:2301], torch.randn(36, 37, dtype=dtype).t()]
    flat += [torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)]
    flat += [torch.randn(1, 9, dtype=dtype).as_strided((1, 9), (50, 1))]
    gaps = [torch.randn(8, 10, dtype=dtype)[:, ::2], torch.randn(3, 4, dtype=dtype)]
    twins = triton_twins(XAdamW, flat + gaps)
    twins.params["triton"][0].data = torch.cat((storage, storage))[3:1103].copy_(flat[0])  # misaligned
    for _ in range(2):
        grads = [torch.randn_like(t) for t in flat + gaps]
        grads[-1] = grads[-1].t().contiguous().t()  # the last one's gradient lies otherwise than its parameter
        twins.step(grads)
        twins.do(lambda optimizer: optimizer.eval())
        twins.do(lambda optimizer: optimizer.train())
    assert twins.optimizers["triton"]._cache.launches[0].tables.n_refused == len(gaps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", range(1, 8))
def test_every_misalignment_of_every_buffer(shift, dtype):
    """Each slot in turn lies at an odd address; whole blocks would fault there."""
    numel = 1100
    for name in ("param", "grad", "exp_avg", "exp_avg_sq"):
        twins = triton_twins(XAdam, [torch.randn(numel, dtype=dtype)])
        twins.step([torch.randn(numel, dtype=dtype)])
        param = twins.params["triton"][0]
        state = twins.optimizers["triton"].state[param]
        shifted = torch.empty(numel + 8, dtype=dtype)[shift : shift + numel]
        if name == "param":
            param.data = shifted.copy_(param)
        elif name != "grad":
            state[name] = shifted.copy_(state[name])
        grad = torch.randn(numel, dtype=dtype)
        for twin in twins.params.values():
            twin[0].grad = shifted.copy_(grad) if name == "grad" else grad.clone()
        twins.do(lambda optimizer: optimizer.step())


@pytest.mark.parametrize("chunk", [1, 7, 1000, 1024, 5000])
def test_chunks_change_no_bit(chunk, monkeypatch):
    monkeypatch.setattr(launch_module, "CHUNK", chunk)
    tensors = [torch.randn(size) for size in (0, 1, max(1, chunk - 1), chunk, chunk + 1, *(2,) * 20)]
    train(triton_twins(XAdamW, tensors), tensors, steps=2)


BYTES = [
    (XSGDM, torch.float32, {}, 20),
    (XAdamW, torch.float32, {}, 28),
    (XAdamW, torch.float32, {"amsgrad": True}, 36),
    (XAdamW, torch.float64, {}, 56),
    (XAdamW, torch.bfloat16, {}, 14),
    (XAdamW, torch.bfloat16, {"master_weights": True}, 28),
]


@pytest.mark.parametrize(("optimizer", "dtype", "options", "expected"), BYTES)
def test_bytes_per_element(optimizer, dtype, options, expected, simulated):
    """A step moves what its base optimizer moves. Master weights that are trusted stand in for the parameter."""
    sizes = (CHUNK, 1500, 3)
    params = [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in sizes]
    params[1].data = torch.empty(1501, dtype=dtype)[1:].copy_(params[1])  # misaligned: no more bytes
    trained = optimizer(params, backend="triton", **options)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        trained.step()
        trained._cache.launches[0].trusts_master = "master_weights" in options
    assert bytes_moved(simulated.simulator.runs[-1]) == expected * sum(sizes)
    assert len(simulated.simulator.runs) == 2


def test_one_launch_for_each_dtype_and_no_number_is_compiled(simulated):
    """Groups, tensors, lr and betas change rows; they add neither launches nor variants."""
    groups = [{"params": [torch.nn.Parameter(torch.randn(n)) for n in range(1, 9)], "lr": lr} for lr in (0.1, 1.0, 0.0)]
    half = torch.nn.Parameter(torch.randn(16, dtype=torch.float16))
    optimizer = XAdamW([*groups, {"params": [half]}], backend="triton")
    for count in (1, 2, 25):
        for param in [param for group in optimizer.param_groups for param in group["params"]][-count:]:
            param.grad = torch.ones_like(param)
        optimizer.param_groups[0].update(lr=16.0 * count, betas=(0.5, 1 - 1 / (1 + count)), prediction_steps=count)
        before = len(simulated.variants)
        optimizer.step()
        assert len(simulated.variants) - before == (1 if count == 1 else 2)
    assert len(set(simulated.variants)) == 2


def test_a_tensor_beyond_32_bits_of_elements():
    """The first and the last chunk of a tensor of more than 2^31 elements; what lies between is not there."""
    numel, chunk = 2**31 + 1029, 1 << 14
    last = numel // chunk
    memory = ptxsim.Memory()
    addresses = torch.zeros((1, 6), dtype=torch.int64)
    ends, mappings = {}, []
    for slot, name in enumerate(("param", "grad", "momentum_buffer")):
        mappings.append(mmap.mmap(-1, numel * 4, flags=UNTOUCHED))
        whole = numpy.frombuffer(mappings[-1], dtype=numpy.float32)
        for part, elements in (("first", whole[:chunk]), ("last", whole[last * chunk :])):
            elements[:] = slot + 1
            memory.register(elements, f"{name} {part}", writable=name != "grad")
            ends[name, part] = elements
        addresses[0, slot] = whole.ctypes.data
    numels, row_of = torch.tensor([numel]), torch.zeros(1, dtype=torch.int32)
    numbers = {"grad_factor": 1.0, "decay_factor": 1.0, "step_size": 0.5, "shift": 0.25, "one_minus_dampening": 1.0}
    rows = torch.tensor([[numbers.get(column, 0.0) for column in XSGDM.rule.columns]])
    chunks = torch.tensor([[0, 0], [0, last]], dtype=torch.int32)
    tables = (addresses, numels, row_of, rows, chunks)
    for index, table in enumerate(tables):
        memory.register(table, f"table {index}", writable=False)
    optimizer = XSGDM([torch.nn.Parameter(torch.ones(1))], backend="triton")
    optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
    optimizer.step()
    launch = optimizer._cache.launches[0]
    kernel, block, shared = load_kernel(90, tuple(multi_tensor.variant_of(launch).items()))
    kernel.launch(2, block, [*tables, chunk, *[0] * (len(kernel.params) - 6)], memory, shared=shared)
    for part in ("first", "last"):
        assert (ends["param", part] == 1 - 0.5 * 2 - 0.25 * 2).all()
        assert (ends["momentum_buffer", part] == 2).all()
