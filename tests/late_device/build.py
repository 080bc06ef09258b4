"""Builds the device's extension at first use, once for each torch, into torch's extension cache."""

import functools
import hashlib
import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

from xgrad_optim.backends import build as native

SOURCES = sorted((Path(__file__).resolve().parent / "csrc").iterdir())
_NAME = "late_device_extension"
_FLAGS = ("-O0", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall")  # torch's headers ask for C++20 from 2.14 on


@functools.cache
def extension() -> ModuleType:
    """The extension's module.

    Raises:
        RuntimeError: it can't be built; the text says why.
    """
    spec = importlib.util.spec_from_file_location(_NAME, _find_or_build())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def missing() -> str | None:
    """What a machine lacks to build it."""
    try:
        native.find_compiler()
    except RuntimeError as error:
        return str(error)
    return None


def _find_or_build() -> Path:
    """The library is named after all that it is made from: one that exists is current."""
    flags = [*_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    digest = hashlib.sha256(repr((flags, torch.version.git_version, sys.implementation.cache_tag)).encode())
    for source in SOURCES:
        digest.update(source.name.encode() + source.read_bytes())
    target = native.cache_directory() / f"{_NAME}-torch{torch.__version__}-{digest.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    compiler, root = native.find_compiler(), Path(torch.__file__).resolve().parent
    folders = [root / "include", root / "include" / "torch" / "csrc" / "api" / "include"]
    includes = [f"-I{folder}" for folder in (*folders, sysconfig.get_paths()["include"])]
    objects = {
        f"{source.stem}.o": [*compiler, *flags, *includes, "-c", str(source), "-o", f"{source.stem}.o"]
        for source in SOURCES
        if source.suffix == ".cpp"
    }
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    link = [*compiler, "-shared", *objects, f"-L{root / 'lib'}", *libraries, "-o", target.name]
    return native.make(target, objects, link)
