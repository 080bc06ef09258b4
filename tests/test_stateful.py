"""Any sequence of what users do to an optimizer leaves the weights that the literal algorithm says, bit for bit.

The oracle keeps theta and theta_hat of each parameter as two explicit copies (tests/oracle.py). `--stateful-examples N`
runs other numbers of sequences than the thousands of CI.
"""

import pytest
from stateful import Machine, run_machine
from twins import needs_library


@needs_library
@pytest.mark.filterwarnings("ignore:.*have left the param groups:UserWarning")  # a new one of the same shape is no heir
def test_any_sequence_leaves_the_weights_of_the_literal_algorithm(request):
    run_machine(Machine, request.config.getoption("--stateful-examples"))
