"""Lets Triton launch on the late device: its JIT compiles for a GPU as ever, ptxsim runs the PTX when streams do."""

from pathlib import Path
from typing import Any

import ptxsim
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from late_device import device
from late_device.launches import launch


def start(architecture: int = 90) -> None:
    """Make it Triton's driver, for the rest of the process."""
    triton.runtime.driver.set_active(LateDriver(architecture))
    triton.knobs.runtime.kernel_load_start_hook.add(_note_files)


class LateDriver(DriverBase):
    """What `triton.runtime.driver.active` is asked for."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture
        self.utils = _Utils()
        self.launcher_cls = Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("no launcher is compiled")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device(device.NAME, 0)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device_index: int) -> int:
        return torch.accelerator.current_stream().stream_id

    def get_device_capability(self, device_index: int = 0) -> tuple[int, int]:
        return divmod(self._architecture, 10)

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("the late device has no clock")


_files: dict[str, str] = {}


def _note_files(module: Any, function: Any, name: str, files: dict[str, str], digest: str) -> None:
    """Triton tells of a kernel's files right before it loads the one for the GPU."""
    _files[name] = next(path for file, path in files.items() if file.endswith(".ptx"))


class _Utils:
    """The GPU's part in loading a kernel."""

    def load_binary(self, name: str, binary: bytes, shared: int, device_index: int) -> tuple[Any, ...]:
        """The module, the function, registers, spills and the most threads of a block."""
        kernel = ptxsim.load_ptx(Path(_files[name]).read_text())[name]
        return object(), kernel, 32, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def get_device_properties(self, device_index: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class Launcher:
    """Called for each launch with the kernel's arguments, after the grid and what real launchers need."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._is_passed = [kind != "constexpr" for kind in source.signature.values()]
        self._threads, self._shared = 32 * metadata.num_warps, metadata.shared

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        kernel: ptxsim.Kernel,
        packed_metadata: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *arguments: Any,
    ) -> None:
        values = [value for value, is_passed in zip(arguments, self._is_passed, strict=True) if is_passed]
        scratch = [0] * (len(kernel.params) - len(values))  # pointers that Triton's own launchers add
        launch(kernel, (grid_x, grid_y, grid_z), self._threads, [*values, *scratch], self._shared)
