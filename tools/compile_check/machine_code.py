"""Instructions of a kernel from text: SASS as cuobjdump prints it, AMDGCN as LLVM does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One instruction of a warp or wavefront.

    Attributes:
        address: place in the code; instructions ascend.
        opcode: mnemonic with its suffixes.
        operands: rest of the line.
        conditional: whether a predicate guards it.
        jump: address that it may go on at; None where it goes on behind itself.
        ends: whether the program ends here, unless it is conditional.
    """

    address: int
    opcode: str
    operands: str
    conditional: bool = False
    jump: int | None = None
    ends: bool = False

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        return self.conditional or not (self.ends or self.jump is not None)


_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;", re.MULTILINE)
_HEX = re.compile(r"0x([0-9a-f]+)\s*\)?$")


def sass(printed: str) -> list[Instruction]:
    """Instructions of ``cuobjdump --dump-sass`` of one kernel.

    The subroutines of a kernel stand behind its last exit. A call goes on behind itself: what a subroutine
    executes, the slow path of a division say, counts as nothing. The endless loop at the end, which is
    never reached, is left out.
    """
    found, reconvergence = [], {}
    for match in _SASS.finditer(printed):
        address, guard, opcode, operands = int(match[1], 16), match[2], match[3], match[4]
        kind = opcode.split(".")[0]
        conditional = guard is not None and guard.strip() not in ("@PT", "@UPT")
        jump, ends = None, kind in ("EXIT", "RET", "KILL")
        target = _HEX.search(operands)
        if kind == "BSSY" and target:
            reconvergence[operands.split(",")[0].strip()] = int(target[1], 16)
        if kind == "BSYNC":
            jump = reconvergence.get(operands.split(",")[0].strip())
            if jump is not None and jump <= address:
                jump = None
        if kind == "BRA" and target:
            jump = int(target[1], 16)
            if jump == address:
                ends, jump = True, None
            # A predicate, or the threads that are to be together, may stand before the address.
            conditional = conditional or "," in operands or ".DIV" in opcode
        found.append(Instruction(address, opcode, operands, conditional, jump, ends))
    while found and (found[-1].opcode == "NOP" or (found[-1].opcode.startswith("BRA") and found[-1].ends)):
        found.pop()
    return found


_LABEL = re.compile(r"^([.\w$]+):")
_AMD = re.compile(r"^\s+((?:s|v|ds|global|buffer|flat|scratch)_\w+)\s*(.*)$")


def amdgcn(assembly: str) -> list[Instruction]:
    """Instructions of one kernel's assembly in LLVM's syntax; addresses count instructions."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in assembly.splitlines():
        line = line.split(";")[0].split("//")[0].rstrip()
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif match := _AMD.match(line):
            lines.append((match[1], match[2].strip()))
    found = []
    for address, (opcode, operands) in enumerate(lines):
        jump = labels.get(operands) if "branch" in opcode else None
        ends = opcode == "s_endpgm"
        found.append(Instruction(address, opcode, operands, opcode.startswith("s_cbranch"), jump, ends))
    # Zeros and traps that fill the last line of the instruction cache.
    while found and found[-1].opcode in ("s_nop", "s_code_end"):
        found.pop()
    return found


READERS: dict[str, Callable[[str], list[Instruction]]] = {"cuda": sass, "hip": amdgcn}
