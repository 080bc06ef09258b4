"""The root that is multiplied (csrc/root.h) has the bits of the square root, for every float and by any estimate.

A driver without torch computes all 2^32 roots with the widest vectors of this machine, and the part of the proof that
is a computation.
"""

import subprocess
from pathlib import Path

import pytest
import torch
from twins import REASON

from xgrad_optim.backends import build


def test_it_is_the_root_of_every_float(tmp_path):
    try:
        compiler = build.find_compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    isa = torch.ops.xgrad_optim.cpu_isas().split(",")[0] if REASON is None else "baseline"
    flags = [*build.compile_args(build.KERNELS), f"-DXGRAD_ISA={isa}", *build._isas()[isa]]
    source, binary = Path(__file__).with_name("exact_root.cpp"), tmp_path / "exact_root"
    done = subprocess.run([*compiler, *flags, str(source), "-o", str(binary)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([str(binary)], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "0 wrong\n", done.stdout
