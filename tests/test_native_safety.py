"""The native libraries touch the memory that they were given and no other.

A driver without torch runs the kernels' headers under AddressSanitizer and UndefinedBehaviorSanitizer, every buffer an
allocation of its own; what reads the tensors runs under both inside Python. In the process itself, random views into
one storage leave every byte between them as it was.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from family import CLASSES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twins import REASON, needs_library, same_bits

from xgrad_optim import launch as launch_module
from xgrad_optim.backends import build

SANITIZERS = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> list[str]:
    """A compiler that has the sanitizers."""
    try:
        compiler = build.find_compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    probe = [*compiler, *SANITIZERS, "-x", "c++", "-", "-o", str(tmp_path_factory.mktemp("probe") / "probe")]
    if subprocess.run(probe, input="int main() {}", text=True, capture_output=True).returncode != 0:
        pytest.skip(f"{compiler[0]} has no sanitizers")
    return compiler


@pytest.fixture(scope="module")
def driver(compiler, tmp_path_factory) -> Path:
    """The standalone driver, for the widest vectors that this machine runs."""
    isa = torch.ops.xgrad_optim.cpu_isas().split(",")[0] if REASON is None else "baseline"
    flags = [f"-DXGRAD_ISA={isa}", *build._isas()[isa]]
    binary = tmp_path_factory.mktemp("driver") / "native_driver"
    source = Path(__file__).parent / "native_driver.cpp"
    flags = [*build.compile_args(build.KERNELS), *SANITIZERS, *flags]
    command = [*compiler, *flags, str(source), "-o", str(binary)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return binary


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sanitizers_find_nothing(driver, seed):
    done = subprocess.run([str(driver), str(seed)], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("0 wrong\n")


@needs_library
def test_sanitizers_find_nothing_where_tensors_are_read(compiler, tmp_path):
    """The reader's own tests once more, on a build for the sanitizers."""
    cache = tmp_path / "xgrad_optim"
    cache.mkdir()
    shutil.copy2(build.find_or_build(build.KERNELS), cache)
    runtimes = [
        subprocess.run([*compiler, f"-print-file-name=lib{name}.so"], text=True, capture_output=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip(f"{compiler[0]} has no shared sanitizers")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "CXX": shlex.join([*compiler, *SANITIZERS]),
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees no memory at its end
    }
    tests = str(Path(__file__).with_name("test_addresses.py"))
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", tests]  # -s: a finding is shown
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout
    assert len(list(cache.glob(f"{build.TENSORS.stem}-*.so"))) == 1


CANARY = 0x5A

ITEMS = {torch.float32: 4, torch.float64: 8, torch.bfloat16: 2, torch.float16: 2}


@st.composite
def _shapes(draw):
    """A shape with an order of its dimensions in memory, and perhaps steps that leave gaps."""
    shape = draw(st.lists(st.integers(0, 9), min_size=0, max_size=3))
    return shape, draw(st.permutations(range(len(shape)))), draw(st.sampled_from([1, 1, 1, 2]))


def _carve(storage: torch.Tensor, start: int, plan) -> tuple[torch.Tensor, int]:
    """A view into the storage that begins at `start` and ends before the returned offset."""
    shape, order, step = plan
    strides, extent = [0] * len(shape), step
    for dim in order:
        strides[dim] = extent
        extent *= max(shape[dim], 1)
    return storage.as_strided(shape, strides, start), start + extent


@needs_library
@given(
    plans=st.lists(_shapes(), min_size=1, max_size=6),
    gaps=st.lists(st.integers(0, 5), min_size=6, max_size=6),
    dtype=st.sampled_from(list(ITEMS)),
    make=st.sampled_from(CLASSES),
    master=st.booleans(),
    chunk=st.sampled_from([3, 16, 64, 1 << 14]),
    transposed=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_views_into_one_storage(plans, gaps, dtype, make, master, chunk, transposed, seed):
    """Parameters and gradients are views into two storages full of canaries; both back ends leave the same bytes."""
    torch.manual_seed(seed)
    capacity = sum(10**3 * 2 + 6 for _ in plans)
    results = []
    values = [torch.randn(plan[0]) for plan in plans]
    before, launch_module.CHUNK = launch_module.CHUNK, chunk
    try:
        for backend in ("torch", "cpu"):
            storages = [torch.full((capacity * ITEMS[dtype],), CANARY, dtype=torch.uint8).view(dtype) for _ in range(2)]
            params, end = [], 0
            for plan, gap, value in zip(plans, gaps, values, strict=False):
                param, next_end = _carve(storages[0], end + gap, plan)
                grad, _ = _carve(storages[1], end + gap, (plan[0], plan[1][::-1] if transposed else plan[1], plan[2]))
                end = next_end
                param.copy_(value)
                grad.copy_(value.cos())
                params.append(torch.nn.Parameter(param))
                params[-1].grad = grad
            untouched = [storages[0].view(torch.uint8)[end * ITEMS[dtype] :], storages[1]]
            copies = [t.clone() for t in untouched]
            optimizer = make(params, backend=backend, master_weights=master, lr=0.1)
            for move in (optimizer.step, optimizer.eval, optimizer.train, optimizer.step):
                move()
            assert torch.equal(untouched[0], copies[0]), "written behind the last parameter"
            assert torch.equal(untouched[1].view(torch.uint8), copies[1].view(torch.uint8)), "a gradient was written"
            results.append((storages[0], [optimizer.state[p] for p in params]))
    finally:
        launch_module.CHUNK = before
    (bytes_torch, states_torch), (bytes_cpu, states_cpu) = results
    assert same_bits(bytes_torch, bytes_cpu)
    for a, b in zip(states_torch, states_cpu, strict=True):
        assert all(same_bits(a[key], b[key]) for key in a)
