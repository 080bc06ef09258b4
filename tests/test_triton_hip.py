"""The Triton kernels compile for AMD's data-centre GPUs, and read and write 16 bytes at a time there too.

Nothing runs them: no simulator of ours knows that machine code.
"""

import pytest
import torch
from family import RULES
from random_launch import Variant

triton_kernels = pytest.importorskip("triton_kernels", reason="the Triton kernels need the package triton")

VARIANTS = [Variant(rule, torch.float32, torch.float32, has_grad) for rule in RULES for has_grad in (True, False)]
VARIANTS += [Variant("adam", torch.bfloat16, dtype, has_grad=True) for dtype in (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("architecture", ["gfx942", "gfx950"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_compiles_with_wide_accesses(variant, architecture):
    compiled = triton_kernels.compile_step(variant, architecture)
    code = compiled.asm["amdgcn"]
    assert "vgpr_spill_count: 0" in code
    if variant.dtype == torch.float32:
        # The parameter, and in a step the gradient; state where it is needed for one of the two.
        assert code.count("global_load_dwordx4") >= (3 if variant.has_grad else 2)
        assert code.count("global_store_dwordx4") >= (2 if variant.has_grad else 1)
