"""The GPU back ends on a GPU: what the simulation proves of their kernels, once more, and all that only a device shows.

Streams, graphs, several devices, waiting, memory. Skipped where there is no GPU, as on the machines that CI runs on.
"""

import copy

import pytest
import torch
from cases import every_case, every_optimizer
from twins import Twins, launches, needs_library, same_bits, train

from xgrad_optim import XSGDM, XAdam, XAdamW, backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use, this machine has none"),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
SIZES = (0, 1, 3, (1 << 14) - 1, 1 << 14, (1 << 14) + 1, 100_003)


@pytest.fixture(params=["triton", "cuda"])
def backend(request) -> str:
    reason = backends.unavailable(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def gpu_twins(backend: str, make, tensors, **options) -> Twins:
    """On the CPU with the CPU back end, and on the GPU."""
    return Twins(make, tensors, names=("cpu", backend), devices=("cpu", "cuda"), **options)


def make_params(sizes=(1000, 70, 4097), dtype=torch.float32, device="cuda") -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to(device, dtype)) for n in sizes]


def set_grads(params, seed: int) -> None:
    """In place where there are gradients, as a captured graph needs it."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)
        param.grad = grad if param.grad is None else param.grad.copy_(grad)


def assert_equal(params, others) -> None:
    for index, pair in enumerate(zip(params, others, strict=True)):
        assert same_bits(*pair), f"parameter {index}"


# -- equality ------------------------------------------------------------------------------------------------------


@needs_library
@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_cpu_back_end(case, dtype, backend):
    tensors = [torch.randn(shape, dtype=dtype) for shape in ((), (0,), (3,), (17, 5), (1024,), (20_000,))]
    for steps, master in ((0, False), (1, False), (2.5, True)):
        train(gpu_twins(backend, case.make, tensors, prediction_steps=steps, master_weights=master), tensors)


@needs_library
@every_optimizer
def test_sizes_around_a_chunk(case, backend):
    tensors = [torch.randn(size) for size in SIZES]
    train(gpu_twins(backend, case.make, tensors), tensors)


@needs_library
@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_special_numbers(case, dtype, backend):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-40, 3e38, 1e-20, 1.0])
    pairs = torch.cartesian_prod(special, special).repeat(11, 1).to(dtype)
    twins = gpu_twins(backend, case.make, [pairs[:, 0].contiguous()], lr=0.1)
    for grad in (pairs[:, 1], pairs[:, 0].flip(0), torch.zeros(len(pairs), dtype=dtype)):
        twins.step([grad.contiguous()])


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_and_tie_is_converted_as_the_cpu_does(dtype, backend):
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    twins = gpu_twins(backend, XSGDM, [halves], lr=1.0, momentum=0.5, dampening=0.25)
    twins.step([halves.flip(0)])
    twins.do(lambda optimizer: optimizer.eval())


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_layouts(dtype, backend):
    storage = torch.randn(5000, dtype=dtype)
    flat = [storage[1:1101], storage[1200:2301], torch.randn(36, 37, dtype=dtype).t()]
    gaps = [torch.randn(8, 10, dtype=dtype)[:, ::2], torch.randn(3, 4, dtype=dtype)]
    twins = gpu_twins(backend, XAdamW, flat + gaps)
    param = twins.params[backend][0]
    param.data = torch.zeros(1103, dtype=dtype, device="cuda")[3:].copy_(flat[0])  # misaligned
    for _ in range(3):
        grads = [torch.randn_like(t) for t in flat + gaps]
        grads[-1] = grads[-1].t().contiguous().t()
        twins.step(grads)
        twins.do(lambda optimizer: optimizer.eval())
        twins.do(lambda optimizer: optimizer.train())


def test_a_tensor_beyond_32_bits_of_elements(backend):
    numel = 2**31 + 1029
    if torch.cuda.mem_get_info()[0] < 8 * numel:
        pytest.skip("needs 17 GB of free memory")
    param = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = XSGDM([param], lr=0.25, backend=backend)
    optimizer.step()
    optimizer.eval()
    for part in (param[:5000], param[2**31 - 3000 : 2**31 + 3], param[-5000:]):
        assert (part == 0.75).all()


# -- waiting, streams, graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}], ids=str)
def test_nothing_waits_for_the_device(options, backend):
    params = make_params()
    optimizer = XAdamW(params, backend=backend, **options)
    for seed in range(3):  # the first builds; that may wait
        set_grads(params, seed)
        torch.cuda.set_sync_debug_mode("error" if seed else "default")
        try:
            optimizer.step()
            optimizer.eval()
            optimizer.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_step_is_one_launch_and_no_copy_to_the_host(backend):
    params = make_params(sizes=range(1, 300))
    optimizer = XAdamW(params, backend=backend)
    for seed in range(2):
        set_grads(params, seed)
        optimizer.step()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("multi_tensor" in name for name in on_device) == 1
    assert not [name for name in on_device if "DtoH" in name]


def test_steps_on_changing_streams(backend):
    """Addresses change at every step, and the host runs ahead of every stream."""
    params, expected = make_params(), make_params(device="cpu")
    optimizers = [XAdamW(params, backend=backend), XAdamW(expected, backend="torch")]
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    previous = streams[0]
    for seed in range(30):
        stream = streams[seed % 3]
        stream.wait_stream(previous)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            for param in params:
                param.grad = None
            set_grads(params, seed)
            optimizers[0].step()
        previous = stream
        set_grads(expected, seed)
        optimizers[1].step()
    torch.cuda.synchronize()
    assert_equal(params, expected)


def train_eagerly(backend, lrs, **options):
    params = make_params()
    lr = torch.tensor(0.01, dtype=torch.float64, device="cuda")
    optimizer = XAdamW(params, lr=lr, backend=backend, capturable=True, **options)
    for seed, value in enumerate(lrs):
        lr.fill_(value)
        set_grads(params, seed)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"master_weights": True}, {"prediction_steps": 3}], ids=str)
def test_a_captured_step_replays_with_a_changing_lr(options, backend):
    lrs = [0.01, 0.02, 0.03, 0.5, 0.0, 0.01]
    expected, expected_optimizer = train_eagerly(backend, lrs, **options)
    params = make_params()
    lr = torch.tensor(0.01, dtype=torch.float64, device="cuda")
    optimizer = XAdamW(params, lr=lr, backend=backend, capturable=True, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for seed in range(2):
            lr.fill_(lrs[seed])
            set_grads(params, seed)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for seed in range(2, len(lrs)):
        lr.fill_(lrs[seed])
        set_grads(params, seed)
        graph.replay()
    torch.cuda.synchronize()
    assert_equal(params, expected)
    optimizer.eval()
    expected_optimizer.eval()
    assert_equal(params, expected)


def test_a_graph_survives_steps_outside_of_it(backend):
    """Steps with gradients elsewhere upload other tables; what the graph reads stays as it was captured."""
    params, expected = make_params(), make_params()
    optimizers = [XAdamW(some, backend=backend, capturable=True) for some in (params, expected)]
    for seed in range(2):
        for some, optimizer in zip((params, expected), optimizers, strict=True):
            set_grads(some, seed)
            optimizer.step()
    static = [param.grad for param in params]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for seed in range(2, 8):
        set_grads(expected, seed)
        optimizers[1].step()
        if seed % 2:
            for param, grad in zip(params, static, strict=True):
                param.grad = grad
            set_grads(params, seed)
            graph.replay()
        else:
            for param in params:
                param.grad = None
            set_grads(params, seed)
            optimizers[0].step()
    torch.cuda.synchronize()
    assert_equal(params, expected)


# -- GradScaler, devices, memory, compilation ----------------------------------------------------------------------


def test_grad_scaler_skips_a_step_that_overflowed(backend):
    params = make_params(dtype=torch.float16)
    optimizer = XAdamW(params, backend=backend, fused=True, master_weights=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    scaler.scale(torch.zeros((), device="cuda"))  # this makes the scale
    for seed in range(4):
        set_grads(params, seed)
        for param in params:
            param.grad.mul_(scaler.get_scale())
        if seed == 2:
            params[0].grad[3] = float("inf")
        before = copy.deepcopy((params, optimizer.state_dict()["state"]))
        scaler.step(optimizer)
        scaler.update()
        after = (params, optimizer.state_dict()["state"])
        if seed == 2:
            assert_equal(before[0], after[0])
            for index, state in before[1].items():
                assert_equal(state.values(), after[1][index].values())
        else:
            assert not torch.equal(before[0][0], after[0][0]) and params[0].isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices_in_one_optimizer(backend):
    sizes = (1000, 70, 4097, 12)
    params = [param.detach().to(f"cuda:{i % 2}") for i, param in enumerate(make_params(sizes, device="cpu"))]
    params = [torch.nn.Parameter(param) for param in params]
    expected = make_params(sizes, device="cpu")
    optimizers = [XAdam(params, backend=backend), XAdam(expected, backend="torch")]
    for seed in range(4):
        for some, optimizer in zip((params, expected), optimizers, strict=True):
            set_grads(some, seed)
            optimizer.step()
            optimizer.eval()
            optimizer.train()
    assert len(launches(optimizers[0])) == 2
    assert_equal(params, expected)


def test_a_step_takes_no_memory_beyond_its_tables(backend):
    params = make_params(sizes=(1 << 24, 1 << 20, 5))
    optimizer = XAdamW(params, backend=backend)
    for seed in range(2):
        set_grads(params, seed)
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    optimizer.eval()
    optimizer.train()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


def test_triton_compiles_no_number():
    """lr, betas, steps and the number of tensors change; the compiled variants stay two, for a step and a swap."""
    if (reason := backends.unavailable("triton")) is not None:
        pytest.skip(reason)
    from xgrad_optim.kernels.multi_tensor import multi_tensor_kernel

    def count() -> int:
        return len(multi_tensor_kernel.device_caches[torch.cuda.current_device()][0])

    def run(n: int, **options) -> None:
        params = make_params(sizes=range(1, 1 + n))
        optimizer = XAdamW(params, backend="triton", **options)
        set_grads(params, n)
        optimizer.step()
        optimizer.eval()

    run(3)
    compiled = count()
    for n in (1, 2, 16, 17):
        run(n, lr=1.0 / n, betas=(0.5, 1 - 1 / (1 + n)), prediction_steps=n, weight_decay=float(n))
    assert count() == compiled
