"""Any sequence of what users do, on the late device: see tests/test_stateful.py."""

import pytest
from stateful import Machine, run_machine

from late_device.device import NAME


class LateMachine(Machine):
    backends = ("triton",)
    device = NAME


class FusedMachine(LateMachine):
    """The state's numbers live on the device."""

    is_fused = True


@pytest.mark.filterwarnings("ignore:.*have left the param groups:UserWarning")
@pytest.mark.parametrize("machine", [LateMachine, FusedMachine])
def test_any_sequence_leaves_the_weights_of_the_literal_algorithm(machine, request):
    run_machine(machine, request.config.getoption("--stateful-examples") // 20)
