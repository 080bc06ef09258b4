"""The device and Triton's driver for it, started together."""

import functools

from late_device import device, triton_driver


def start() -> None:
    """Raises what kept it from starting, at every call."""
    error = _start()
    if error is not None:
        raise error


@functools.cache
def _start() -> Exception | None:
    try:
        device.start()
        triton_driver.start()
    except Exception as error:
        return error
    return None
