"""What a kernel, or its text, can do wrong."""


class PTXError(RuntimeError):
    """Base of all errors that the simulated program causes."""


class PTXSyntaxError(PTXError):
    """The text is not PTX that the parser knows."""


class BarrierError(PTXError):
    """Threads wait for others that will never come."""


class TrapError(PTXError):
    """The kernel trapped, or a device assertion failed."""


class StepLimitError(PTXError):
    """A block took more steps than it was allowed."""


class MemoryFault(PTXError):
    """An access outside of every buffer, a misaligned one, or a store to a read-only buffer.

    Attributes:
        reason, kernel, line, instruction: what happened, and where in the PTX.
        block, thread: indices of the first thread that faults.
        address, width: of its access, in bytes.
        nearest: the buffer next to the address, in words.
    """

    def __init__(
        self,
        reason: str,
        kernel: str,
        line: int,
        instruction: str,
        block: tuple[int, ...],
        thread: tuple[int, ...],
        address: int,
        width: int,
        nearest: str,
        n_threads: int = 1,
    ) -> None:
        self.reason, self.kernel, self.line, self.instruction = reason, kernel, line, instruction
        self.block, self.thread = block, thread
        self.address, self.width, self.nearest = address, width, nearest
        others = f" ({n_threads} threads fault here)" if n_threads > 1 else ""
        super().__init__(
            f"{reason}: kernel {kernel}, PTX line {line}: `{instruction}`, block {block}, thread {thread}, "
            f"address {address:#x}, width {width}, nearest buffer: {nearest}{others}"
        )
