"""The native CPU back end equals the torch back end in every bit.

Equality can break by another order of operations, by a rounding that a wider register skips, in the ragged end of a
tensor, between two instruction sets, by how work is cut up, and by how a tensor lies in memory.
"""

import itertools

import pytest
import torch
from cases import PLAIN, every_optimizer
from family import RULES
from random_launch import Variant, random_launch
from twins import Twins, launches, needs_library, runs, same_bits, train

from xgrad_optim import XSGDM, XAdamW
from xgrad_optim import launch as launch_module
from xgrad_optim.backends import cpu

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@needs_library
@every_optimizer
@every_dtype
def test_equals_the_torch_back_end(case, dtype):
    """Every option, on sizes around a vector, several row groups at once."""
    tensors = [torch.randn(shape, dtype=dtype) for shape in ((), (0,), (3,), (17, 5), (64,), (130,))]
    either, amsgrads = (False, True), (False, True) if case.takes("amsgrad") else (False,)
    for s, master, amsgrad, ascend in itertools.product((0, 1, 2.5), either, amsgrads, either):
        options = {"prediction_steps": s, "master_weights": master, "maximize": ascend, "lr": 0.02}
        options |= {"amsgrad": True} if amsgrad else {}
        options |= {"weight_decay": 0.1} if ascend != master else {"weight_decay": 0}
        if case.takes("decoupled_weight_decay"):
            options["decoupled_weight_decay"] = not ascend
        if case.takes("momentum"):
            options["momentum"] = 0.0 if master and not ascend else 0.9
        if case.takes("dampening"):
            options["dampening"] = 0.3 if ascend else 0
        train(Twins(case.make, tensors, **options), tensors)


@needs_library
@every_optimizer
def test_groups_and_skipped_gradients_have_rows_of_their_own(case):
    tensors = [torch.randn(70) for _ in range(4)]

    def make(params, **options):
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "prediction_steps": 3, "weight_decay": 0.2}]
        return case.make(groups, **options)

    twins = Twins(make, tensors)
    for step in range(5):
        twins.step([None if step == index else torch.randn(70) for index in range(4)])
    assert len(set(launches(twins.optimizers["cpu"])[0].sources.row_of)) > 1


@needs_library
@every_optimizer
def test_special_numbers(case):
    """NaN stays in its element, infinities and subnormals take the same way in both."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-40, 3e38, 1e-20, 1.0])
    pairs = torch.cartesian_prod(special, special)
    twins = Twins(case.make, [pairs[:, 0].contiguous()], lr=0.1)
    for grad in (pairs[:, 1], pairs[:, 0].flip(0), torch.zeros(100)):
        twins.step([grad.contiguous()])
    finite = Twins(case.make, [torch.ones(40)])
    finite.step([torch.full((40,), float("nan")).where(torch.arange(40) == 33, torch.ones(40))])
    assert finite.params["cpu"][0].isnan().nonzero().tolist() == [[33]]


@needs_library
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1])
@pytest.mark.parametrize("has_master", [False, True])
def test_no_nan_is_rounded_to_a_number(rule, bits, has_master):
    """A NaN whose every bit is set becomes a zero where it is rounded to bfloat16 as a number is."""
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    for has_grad in (False, True):
        variant = Variant(rule, torch.bfloat16, torch.float32, has_grad, has_master_weights=has_master)
        launch = random_launch(variant, (70,) * 7, chunk_size=64)
        for param in launch.params:
            param.zero_()  # which is what such a NaN of a master would be taken for
        for place, tensors in enumerate(launch.state.values()):
            for tensor in tensors:
                tensor[10 * place : 10 * place + 5] = nan
        launch.rows[1, 5:] = nan
        other = launch.copied()
        launch.run_on_cpu()
        other.run_on_torch()
        for name, tensor in launch.tensors().items():
            assert same_bits(tensor, other.tensors()[name]), name


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_16_bit_number_and_tie_is_converted_as_torch_does(dtype, isa, monkeypatch):
    """SGD without momentum, from 0, with lr 1, writes minus the gradient: the state shows how a float was rounded."""
    _force(isa, monkeypatch)
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    twins = Twins(XSGDM, [halves], lr=1.0, momentum=0.5, dampening=0.25)
    twins.step([halves.flip(0)])
    if dtype is torch.bfloat16:
        param = twins.params["cpu"][0]
        for stored in (param.detach(), twins.optimizers["cpu"].state[param]["momentum_buffer"]):
            assert stored[stored.isnan()].view(torch.int16).unique().tolist() == [0x7FC0]
    between = halves.float() * torch.linspace(0.9, 1.1, halves.numel())
    edges = torch.tensor([65519.0, 65520.0, 65535.9, 2.0**-25, 2.0**-24, 1.5 * 2.0**-24, 6.1e-5, 3.3e38, 3.4e38, 1e-41])
    master = Twins(XSGDM, [torch.zeros(halves.numel() + 10, dtype=dtype)], lr=1.0, momentum=0.0, master_weights=True)
    for twin in master.params.values():
        twin[0].grad = torch.zeros_like(twin[0])
    master.do(lambda optimizer: optimizer.step())
    for name, params in master.params.items():
        master.optimizers[name].state[params[0]]["momentum_buffer"].copy_(torch.cat((between, edges)))
    master.do(lambda optimizer: optimizer.eval())
    master.do(lambda optimizer: optimizer.train())


def _force(isa: str, monkeypatch) -> None:
    if isa not in torch.ops.xgrad_optim.cpu_isas().split(","):
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setattr(cpu, "ISA", isa)


@needs_library
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
@every_dtype
def test_instruction_sets_agree(isa, dtype, monkeypatch):
    _force(isa, monkeypatch)
    tensors = [torch.randn(n, dtype=dtype) for n in (1, 37, 600)]
    for case, master in itertools.product(PLAIN, (False, True)):
        train(Twins(case.make, tensors, master_weights=master, lr=0.02), tensors, steps=3)


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 7, 16, 1000, 1 << 14])
def test_threads_and_chunks_change_no_bit(threads, chunk, monkeypatch):
    monkeypatch.setattr(launch_module, "CHUNK", chunk)
    sizes = (0, 1, chunk - 1, chunk, chunk + 1, 3 * chunk + 5, *(2,) * 50)
    tensors = [torch.randn(size) for size in sizes]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        train(Twins(XAdamW, tensors), tensors, steps=2)
    finally:
        torch.set_num_threads(before)


@needs_library
def test_the_tables_cover_every_element_once():
    tables = launch_module.Tables([5, 0, 1, 12, 4], [0, 0, 1, 0, 1], chunk_size=4, has_grad=True)
    assert tables.chunks.tolist() == [[0, 0], [0, 1], [1, 0], [2, 0], [3, 0], [3, 1], [3, 2], [4, 0]]
    assert tables.tasks[0] == 0 and tables.tasks[-1] == 8 and (tables.tasks.diff() > 0).all()
    assert tables.table[:, launch_module.NUMEL].tolist() == [5, 0, 1, 12, 4]
    assert tables.table[:, launch_module.ROW].tolist() == [0, 0, 1, 0, 1]


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_layouts(dtype):
    """Views at odd offsets and permuted but dense tensors run natively, the others on the torch back end."""
    storage = torch.randn(5000, dtype=dtype)
    flat = [storage[1:68], storage[70:171], torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)]
    flat += [torch.randn(6, 7, dtype=dtype).t(), torch.randn(1, 9, dtype=dtype).as_strided((1, 9), (50, 1))]
    gaps = [torch.randn(8, 10, dtype=dtype)[:, ::2], torch.randn(3, 4, dtype=dtype)]
    twins = Twins(XAdamW, flat + gaps)
    native = twins.params["cpu"]
    native[0].data = torch.cat((storage, storage))[3:70].copy_(flat[0])  # misaligned
    for _ in range(3):
        grads = [torch.randn_like(t) for t in flat + gaps]
        grads[-1] = grads[-1].t().contiguous().t()  # the last one's gradient lies otherwise than its parameter
        twins.step(grads)
        twins.do(lambda optimizer: optimizer.eval())
        twins.do(lambda optimizer: optimizer.train())
    by_backend = {type(run.runner).__module__.split(".")[-1]: run.launch for run in runs(twins.optimizers["cpu"])}
    assert len(by_backend["torch"].params) == 1 and len(by_backend["cpu"].params) == len(flat + gaps) - 1


@needs_library
@pytest.mark.parametrize(
    "lazy",
    [lambda g: g.conj().imag, lambda g: torch._efficientzerotensor(g.shape)],
    ids=["negated", "zeros"],
)
def test_gradients_that_are_not_yet_computed(lazy):
    values = torch.randn(30, dtype=torch.complex64)
    twins = Twins(XAdamW, [torch.randn(30), torch.randn(30)])
    for name, params in twins.params.items():
        params[0].grad, params[1].grad = lazy(values), torch.ones(30)
        assert params[0].grad.is_neg() or params[0].grad._is_zerotensor()
        twins.optimizers[name].step()
    twins.check()


@needs_library
def test_conjugated_gradient():
    values = torch.randn(30, dtype=torch.complex64)
    twins = Twins(XAdamW, [torch.randn(30, dtype=torch.complex64)])
    for name, params in twins.params.items():
        params[0].grad = values.conj()
        twins.optimizers[name].step()
    twins.check()
