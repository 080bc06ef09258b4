"""Compile the native libraries: ahead of time for setup.py, or at first use into torch's extension cache.

It knows nothing of the rest of the package, so that setup.py can load it by its path.

Not by torch.utils.cpp_extension.load: a build that is killed leaves its lock file, and every later process waits for it
without end. It also links libtorch_python, so that a library of the stable ABI would no longer serve other torches and
Pythons, and has one set of flags for all sources, none for each instruction set.
"""

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

TARGET_VERSION = "0x020a000000000000"
"""The stable ABI of torch 2.10, the first that has parallel_for: the library runs on this torch and all later ones."""

PACKAGE = Path(__file__).resolve().parent.parent
_FLAGS = ("-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno")
_ISA_FLAGS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
}
_TIMEOUT = 600.0
"""Seconds for a whole build; one takes about ten on two cores."""


class Library(NamedTuple):
    """What is compiled into one library: multi_tensor_cpu.cpp once for each instruction set."""

    stem: str
    sources: tuple[str, ...]
    is_stable: bool
    """Whether one build serves every torch from TARGET_VERSION on, not only the one that it was made with."""


KERNELS = Library("libxgrad_optim", ("bindings.cpp", "multi_tensor_cpu.cpp"), is_stable=True)
TENSORS = Library("libxgrad_optim_tensors", ("launch_tensors.cpp",), is_stable=False)
LIBRARIES = (KERNELS, TENSORS)


def source_directory() -> Path:
    """Inside an installed package, beside the package in a checkout."""
    inside = PACKAGE / "csrc"
    return inside if inside.is_dir() else PACKAGE.parent / "csrc"


def sources(library: Library) -> list[Path]:
    return [source_directory() / name for name in library.sources]


def headers() -> list[Path]:
    return sorted(source_directory().glob("*.h"))


def compile_args(library: Library) -> list[str]:
    """Flags of every source. Never -ffast-math: it also turns off subnormals for the process that loads the library."""
    if library.is_stable:
        return [*_FLAGS, "-std=c++17", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]
    import torch

    # Headers of torch from 2.14 on need C++20.
    standard = "-std=c++20" if torch_version() >= (2, 14) else "-std=c++17"
    return [*_FLAGS, standard, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]


def library_name(library: Library) -> str:
    """Named after all that it is made from, so that a name that exists is a library that is current."""
    made_with: tuple[object, ...] = ()
    if not library.is_stable:
        import torch

        made_with = (torch.__version__, torch.version.git_version)
    return f"{library.stem}-{digest_of(sources(library), compile_args(library), _isas(), *made_with)}.so"


def digest_of(inputs: list[Path], *flags: object) -> str:
    """Stands for these sources and all headers, the flags, and the platform."""
    digest = hashlib.sha256(repr((*flags, sys.platform, platform.machine())).encode())
    for path in (*inputs, *headers()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def find_or_build(library: Library) -> Path:
    """The current library: the one installed with the package, else the cached one, else a new one in the cache.

    Raises:
        RuntimeError: it can't be built; the text says why.
    """
    torch_directory()
    try:
        name = library_name(library)
    except OSError as error:
        raise RuntimeError(f"the C++ sources are missing: {error}") from None
    for directory in (PACKAGE, cache_directory()):
        if (directory / name).is_file():
            return directory / name
    return build(library, cache_directory())


def load(path: Path) -> bool:
    """Load a library into torch. Returns whether it had to; RuntimeError where another version of it is loaded."""
    import torch

    stem = path.stem.split("-")[0]
    loaded = [other for other in map(Path, torch.ops.loaded_libraries) if other.name.split("-")[0] == stem]
    if any(other.name != path.name for other in loaded):
        raise RuntimeError(f"this process has loaded another version of the library, {loaded[0]}")
    if not loaded:
        torch.ops.load_library(path)
    return not loaded


def reason_why_not(obtain: Callable[[], None]) -> Callable[[], str | None]:
    """Turn what obtains a library into what tells why it can't be had: it is called once, by one thread."""
    lock = threading.Lock()

    @functools.cache
    def ask() -> str | None:
        try:
            obtain()
        except (RuntimeError, OSError) as error:
            return str(error)
        return None

    @functools.wraps(obtain)
    def reason() -> str | None:
        with lock:
            return ask()

    return reason


def build(library: Library, directory: Path | str) -> Path:
    """Compile the library into `directory`, whole or not at all, one process at a time; returns its path.

    Raises:
        RuntimeError: no compiler, a compiler's error, or a directory that can't be written.
    """
    compiler, torch = find_compiler(), torch_directory()
    include = [f"-I{torch / 'include'}"]
    if not library.is_stable:
        include.append(f"-I{torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}")
    objects: dict[str, list[str]] = {}
    for source in sources(library):
        variants = _isas() if source.name == "multi_tensor_cpu.cpp" else {"": ()}
        for isa, flags in variants.items():
            isa_flags = [f"-DXGRAD_ISA={isa}", *flags] if isa else []
            output = f"{source.stem}{isa}.o"
            objects[output] = [*compiler, *compile_args(library), *isa_flags, *include, "-c", str(source), "-o", output]
    name = library_name(library)
    needed = ["-ltorch_cpu"] if library.is_stable else ["-ltorch_cpu", "-lc10"]
    link = [*compiler, "-shared", *objects, f"-L{torch / 'lib'}", *needed, "-o", name]
    return make(Path(directory) / name, objects, link)


def make(target: Path, objects: dict[str, list[str]], link: list[str]) -> Path:
    """Run the commands that make each object and then the target, in a folder of their own; returns the target."""
    directory = target.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory / f"{target.name}.lock"):
            if not target.is_file():
                with tempfile.TemporaryDirectory(dir=directory, prefix=".build-") as scratch:
                    _run(Path(scratch), objects, target.name, link, target.with_suffix(".log"))
                    os.replace(Path(scratch) / target.name, target)
    except OSError as error:
        raise RuntimeError(f"the library can't be built in {directory}: {error}") from None
    return target


def cache_directory() -> Path:
    """Where torch puts extensions, $TORCH_EXTENSIONS_DIR first; one folder for every torch, names tell them apart."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        root = os.path.join(home, "torch_extensions")
    return Path(root) / "xgrad_optim"


def find_compiler() -> list[str]:
    """The C++ compiler's command line: $CXX, or the first one on the PATH."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    missing = " ".join(wanted) or "g++ or clang++"
    raise RuntimeError(f"there is no C++ compiler ({missing} not found); install one or set CXX")


def _isas() -> dict[str, tuple[str, ...]]:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return _ISA_FLAGS
    return {"baseline": ()}


def _run(scratch: Path, objects: dict[str, list[str]], name: str, link: list[str], log: Path) -> None:
    """With ninja the objects are compiled in parallel, without it one after the other."""
    ninja = shutil.which("ninja", path=os.pathsep.join((os.environ.get("PATH", ""), sysconfig.get_path("scripts"))))
    commands = [*objects.values(), link]
    if ninja is not None:
        lines = ["rule run", "  command = $line"]
        for output, command in {**objects, name: link}.items():
            inputs = " ".join(objects) if output == name else ""
            line = shlex.join(command).replace("$", "$$")
            lines += [f"build {output}: run {inputs}", f"  line = {line}"]
        (scratch / "build.ninja").write_text("\n".join(lines) + "\n")
        commands = [[ninja]]
    for command in commands:
        try:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the compiler did not finish in {_TIMEOUT:.0f} seconds") from None
        if done.returncode != 0:
            output = done.stdout + done.stderr
            log.write_text(output, encoding="utf-8")
            raise RuntimeError(f"compiling failed: {_cause(output)[:200]} (all of it is in {log})")


def _cause(output: str) -> str:
    """The line that most likely says what was wrong: the first error, else the last line that is not ninja's."""
    lines = [line.strip() for line in output.splitlines() if not line.startswith(("[", "FAILED", "ninja:"))]
    errors = [line for line in lines if "error:" in line.lower()]
    return (errors or lines[::-1] or ["no output"])[0]


def torch_directory() -> Path:
    """Where torch's headers and libraries are."""
    import torch

    if torch_version() < (2, 10):
        raise RuntimeError(f"it needs torch 2.10 or newer, this is {torch.__version__}")
    return Path(torch.__file__).resolve().parent


def torch_version() -> tuple[int, ...]:
    import torch

    return tuple(int(part) for part in torch.__version__.split(".")[:2])


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time, and released by the system should it die."""
    try:
        import fcntl
    except ImportError:
        raise RuntimeError(f"it is not built on {sys.platform}") from None
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
