"""What ptxas made of a kernel: registers, spills, the widths of its memory accesses, the length of its main loop.

Needs no GPU: Triton's wheel brings NVIDIA's assembler and disassembler.
"""

import functools
import importlib.util
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""What every kernel is compiled for: A100, H100 and B200."""

_FUNCTION = re.compile(r"^\s*Function\s*:\s*(\S+)", re.MULTILINE)
_USAGE = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def tool(name: str) -> Path | None:
    """One of NVIDIA's programs out of Triton's wheel, which need not be importable."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    return path if path.exists() else None


REASON = None if tool("cuobjdump") else "there is no cuobjdump: install triton"


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.fullmatch(r"(?:\S+,\s*)?(0x[0-9a-f]+)\s*", self.operands)
        return int(found[1], 16) if self.opcode.split(".")[0] == "BRA" and found else None

    @property
    def width(self) -> int | None:
        """Bytes that a thread moves, of an access to global memory."""
        kind, *modifiers = self.opcode.split(".")
        if kind not in ("LDG", "STG", "LD", "ST"):
            return None
        return next((_WIDTHS[modifier] for modifier in modifiers if modifier in _WIDTHS), 4)


@dataclass(frozen=True)
class MachineCode:
    """One kernel as the GPU will run it."""

    name: str
    registers: int
    stack: int
    """Bytes of a thread's local memory, which is where spilled registers go."""
    instructions: tuple[Instruction, ...]

    @property
    def local_accesses(self) -> int:
        return sum(i.opcode.split(".")[0] in ("LDL", "STL") for i in self.instructions)

    @property
    def loops(self) -> list[tuple[Instruction, ...]]:
        """From the target of each backward branch to the branch.

        Divisions and roots leave a loop for their rare cases; those subroutines are not part of it.
        """
        loops = []
        for end, branch in enumerate(self.instructions):
            target = branch.target
            if target is not None and target < branch.address:
                start = next(k for k, i in enumerate(self.instructions) if i.address >= target)
                loops.append(self.instructions[start : end + 1])
        return loops

    def issue_slots(self, restores: bool) -> int:
        """Instructions that a thread executes in one round of the main loop, with a prediction to undo or without.

        The rare cases of divisions and roots, which are calls, are stepped over.
        """
        loop = {instruction.address: index for index, instruction in enumerate(self.main_loop)}
        count = index = 0
        while index < len(loop):
            instruction = self.main_loop[index]
            target = loop.get(instruction.target or -1, -1)
            count, index = count + 1, index + 1
            if target <= index:  # no branch, or the one that ends the round
                continue
            skipped = {each.opcode.split(".")[0] for each in self.main_loop[index:target]}
            is_rare_case = "CALL" in skipped and "BSSY" not in skipped
            if is_rare_case or not restores:
                index = target
        return count

    @property
    def main_loop(self) -> tuple[Instruction, ...]:
        """The shortest loop that moves the most memory."""
        return max(self.loops, key=lambda loop: (sum(i.width or 0 for i in loop), -len(loop)), default=())

    def widths(self, kind: str, instructions: tuple[Instruction, ...] | None = None) -> Counter[int]:
        """How many accesses of each width there are; `kind` is "LD" or "ST"."""
        chosen = self.instructions if instructions is None else instructions
        return Counter(i.width for i in chosen if i.width is not None and i.opcode.startswith(kind))

    @property
    def generic_accesses(self) -> int:
        """Accesses whose address could be shared or local memory's, as far as the compiler knew."""
        return sum(i.opcode.split(".")[0] in ("LD", "ST") for i in self.instructions)


def assemble(ptx: Path, architecture: str, cubin: Path) -> Path:
    """PTX to machine code by the ptxas of Triton's wheel; multiplications and additions stay apart."""
    ptxas = tool("ptxas-blackwell" if int(architecture.removeprefix("sm_").rstrip("a")) >= 100 else "ptxas")
    _run(str(ptxas), f"--gpu-name={architecture}", "--fmad=false", str(ptx), "-o", str(cubin))
    return cubin


@functools.cache
def kernels_of(cubin: Path) -> dict[str, MachineCode]:
    """Every kernel of a cubin by its (mangled) name."""
    usage = usage_of(cubin)
    _preamble, *texts = _FUNCTION.split(_disassemble("-sass", cubin))
    kernels = {}
    for name, text in zip(texts[::2], texts[1::2], strict=True):
        instructions = tuple(Instruction(int(a, 16), op, rest) for a, op, rest in _INSTRUCTION.findall(text))
        kernels[name] = MachineCode(name, *usage[name], instructions)
    return kernels


def usage_of(cubin: Path) -> dict[str, tuple[int, int]]:
    """Registers and bytes of local memory of every kernel; a hundred times faster than the instructions."""
    found = _USAGE.findall(_disassemble("-res-usage", cubin))
    return {name: (int(registers), int(stack) + int(local)) for name, registers, stack, _shared, local in found}


def _disassemble(option: str, cubin: Path) -> str:
    return _run(str(tool("cuobjdump")), option, str(cubin))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout
