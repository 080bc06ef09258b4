"""Compile the CUDA library: ahead of time for setup.py, or when the back end is first used. Needs nvcc, but no GPU.

An architecture is a number, ten times the compute capability: 90 is sm_90.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from xgrad_optim.backends import build as native

COMMON_ARCHITECTURES = (80, 90, 100)
"""A100, H100 and B200: what a library is made for ahead of time, unless $TORCH_CUDA_ARCH_LIST says otherwise."""

DEVICE_FLAGS = ("-std=c++17", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false", "-DXGRAD_ISA=cuda")
"""The numeric contract: every operation rounds once, and subnormals stay."""

_FLAGS = (*DEVICE_FLAGS, "-O2", "-Xptxas=--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off")


def find_or_build(capabilities: Sequence[int]) -> Path:
    """A current library that runs on these GPUs: installed with the package, cached, or a new one in the cache.

    Raises:
        RuntimeError: it can't be built; the text says why.
    """
    return find(capabilities) or build(native.cache_directory(), architectures_for(capabilities))


def find(capabilities: Sequence[int]) -> Path | None:
    """A current library that runs on these GPUs, if there is one."""
    native.torch_directory()
    try:
        stem = _stem()
    except OSError as error:
        raise RuntimeError(f"the CUDA sources are missing: {error}") from None
    for directory in (native.PACKAGE, native.cache_directory()):
        for path in sorted(directory.glob(f"{stem}-*.so")):
            made_for = [int(number) for number in path.stem.removeprefix(f"{stem}-").split("-")]
            if all(runs_on(made_for, capability) for capability in capabilities):
                return path
    return None


def build(directory: Path | str, architectures: Sequence[int]) -> Path:
    """Compile the library for these architectures into `directory`, one process at a time; returns its path.

    Raises:
        RuntimeError: no nvcc, a compiler's error, or a directory that can't be written.
    """
    nvcc, torch = find_nvcc(), native.torch_directory()
    bindings, kernels = sources()
    abi = (f"-DTORCH_TARGET_VERSION={native.TARGET_VERSION}", f"-I{torch / 'include'}")
    objects = {"bindings.o": [*nvcc, *_FLAGS, *abi, "-c", str(bindings), "-o", "bindings.o"]}
    for rule in rules().values():
        rule_flags = (f"-DXGRAD_RULE={rule}", *_code_flags(architectures))
        objects[f"{rule}.o"] = [*nvcc, *_FLAGS, *rule_flags, "-c", str(kernels), "-o", f"{rule}.o"]
    name = "-".join((_stem(), *map(str, sorted(architectures)))) + ".so"
    # The static runtime asks for no CUDA library at load time, and can't be another one than it was compiled with.
    link = [*nvcc, "-shared", "-cudart=static", *objects, f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", name]
    return native.make(Path(directory) / name, objects, link)


def rules() -> dict[str, str]:
    """The structs in the list of csrc/rules.h by name; multi_tensor_cuda.cu is compiled once for each."""
    text = (native.source_directory() / "rules.h").read_text(encoding="utf-8")
    return {name: struct for struct, name in re.findall(r'X\((\w+), "(\w+)"\)', text)}


def sources() -> list[Path]:
    return [native.source_directory() / name for name in ("bindings_cuda.cpp", "multi_tensor_cuda.cu")]


def runs_on(made_for: Sequence[int], capability: int) -> bool:
    """Machine code runs on later GPUs of its own generation, the newest architecture's PTX on all later GPUs."""
    has_code = any(known // 10 == capability // 10 and known <= capability for known in made_for)
    return has_code or max(made_for) <= capability


def architectures_for(capabilities: Sequence[int]) -> list[int]:
    """The best architecture that nvcc knows for each of these GPUs."""
    known = _known_architectures()
    unserved = [capability for capability in capabilities if capability < min(known)]
    if unserved:
        raise RuntimeError(f"this nvcc does not compile for compute capability {unserved[0] / 10}")
    return sorted({max(number for number in known if number <= capability) for capability in capabilities})


def architectures_ahead_of_time() -> list[int]:
    """Those of $TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), else the common ones that nvcc knows."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not wanted:
        return sorted(set(COMMON_ARCHITECTURES).intersection(_known_architectures()))
    numbers = [re.fullmatch(r"(\d+)\.(\d)(?:\+PTX)?", text) for text in re.split(r"[\s;]+", wanted.strip())]
    if not all(numbers):
        raise RuntimeError(f'TORCH_CUDA_ARCH_LIST must be like "8.0;9.0+PTX", got {wanted!r}')
    return sorted({int(number[1] + number[2]) for number in numbers if number})


def find_nvcc() -> list[str]:
    """nvcc's command line: of $CUDA_HOME, or on the PATH, or in the usual place; $CXX is its host compiler."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next(filter(None, map(shutil.which, candidates)), None)
    if found is None:
        raise RuntimeError(f"there is no nvcc ({' or '.join(candidates)}); install the CUDA toolkit or set CUDA_HOME")
    compiler = shlex.split(os.environ.get("CXX", ""))
    return [found, f"-ccbin={compiler[0]}"] if compiler else [found]


def _stem() -> str:
    return f"libxgrad_optim_cuda-{native.digest_of(sources(), _FLAGS, native.TARGET_VERSION)}"


def _code_flags(architectures: Sequence[int]) -> list[str]:
    """Machine code for each, and PTX of the newest, which later GPUs compile when they load it."""
    newest = max(architectures)
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in sorted(architectures)]
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def _known_architectures() -> list[int]:
    listing = subprocess.run([find_nvcc()[0], "--list-gpu-arch"], capture_output=True, text=True)
    known = [int(number) for number in re.findall(r"compute_(\d+)", listing.stdout)]
    if not known:
        raise RuntimeError(f"nvcc --list-gpu-arch failed:\n{(listing.stdout + listing.stderr).strip()}")
    return known
