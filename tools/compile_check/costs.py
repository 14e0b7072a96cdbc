"""What the instructions of a stretch cost: issue slots, slower units, shared memory, barriers, products."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tools.compile_check.flow import Stretch
from tools.compile_check.machine_code import Instruction

# Units of one of the four parts of an NVIDIA multiprocessor that take a warp in more than one cycle, from
# the throughput table of the CUDA C++ Programming Guide (compute capability 8.0 and 9.0: results a cycle
# and multiprocessor, 128 being one warp a cycle and part): 64 for integer and logic operations, compares,
# minima, selections, integer multiply-adds (by another unit) and double precision; 32 for shuffles; 16 for
# special functions and conversions.
_ALU = (
    "FSETP",
    "FSEL",
    "FMNMX",
    "FMNMX3",
    "FCHK",
    "FSET",
    "IADD3",
    "IADD",
    "ISETP",
    "SEL",
    "IMNMX",
    "VIMNMX",
    "VIMNMX3",
    "LOP",
    "LOP3",
    "PLOP3",
    "SHF",
    "SHL",
    "SHR",
    "LEA",
    "PRMT",
    "IABS",
    "FLO",
    "BMSK",
    "SGXT",
    "BREV",
    "POPC",
    "P2R",
    "R2P",
    "VOTE",
    "VABSDIFF",
    "F2FP",
    "I2FP",
    "HMNMX2",
    "HSETP2",
)
_DOUBLE = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")
_SPECIAL = ("MUFU", "F2I", "F2F", "I2F", "FRND")
_CYCLES = dict.fromkeys(_ALU, ("alu", 2)) | dict.fromkeys(_DOUBLE, ("double", 2))
_CYCLES |= dict.fromkeys(_SPECIAL, ("special", 8)) | {"SHFL": ("shuffle", 4), "IMAD": ("multiply", 2)}


@dataclass
class Costs:
    """Of one pass through a stretch.

    Attributes:
        instructions: a thread, each an issue slot of its warp.
        alu, multiply, double, special, shuffle: cycles of these units of NVIDIA's for a warp.
        shared: bytes a thread reads from shared memory and writes there.
        barriers: of all threads of a block.
        tensor: tensor-core instructions.
        tensor_flops: operations of these, a warp or wavefront; None where the instruction does not say.
        warp_flops: the part of them that single warps take (HMMA on a target that also has HGMMA).
        multiply_adds: float32 multiply-adds, a thread.
        drained: waits for all tensor-core instructions of a warp group; None where it has none to wait for.
    """

    instructions: int = 0
    alu: int = 0
    multiply: int = 0
    double: int = 0
    special: int = 0
    shuffle: int = 0
    shared: int = 0
    barriers: int = 0
    tensor: int = 0
    tensor_flops: float | None = 0.0
    warp_flops: float = 0.0
    multiply_adds: int = 0
    drained: int | None = None

    @property
    def slots(self) -> int:
        """Cycles of a quarter of a multiprocessor for a warp, if nothing is waited for."""
        return max(self.instructions, self.alu, self.multiply, self.double, self.special, self.shuffle)


@dataclass
class Pass:
    """A :class:`~.flow.Stretch`, so a kernel or one of its loops: costs of a pass, and the loops inside."""

    costs: Costs
    loops: list[Pass]

    def everything(self) -> list[Pass]:
        return [self, *(inner for loop in self.loops for inner in loop.everything())]


def passes(stretch: Stretch) -> Pass:
    """The costs of a kernel and of all its loops."""
    return Pass(costs(stretch.instructions), [passes(loop) for loop in stretch.loops])


def costs(instructions: Sequence[Instruction]) -> Costs:
    """Of instructions that are executed one after the other."""
    total = Costs()
    for instruction in instructions:
        total.instructions += 1
        if instruction.opcode[0].islower():
            _add_amd(total, instruction)
        else:
            _add_nvidia(total, instruction)
    return total


_WIDTH = re.compile(r"\.(?:U?(8|16|32|64|128)|S(8|16))(?:\.|$)")
_HGMMA = re.compile(r"HGMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)")
_HMMA = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}


def _bytes(opcode: str) -> int:
    found = _WIDTH.search(opcode)
    return int(found[1] or found[2]) // 8 if found else 4


def _add_nvidia(total: Costs, instruction: Instruction) -> None:
    opcode = instruction.opcode
    kind = opcode.split(".")[0]
    if kind in _CYCLES:
        unit, cycles = _CYCLES[kind]
        setattr(total, unit, getattr(total, unit) + cycles)
    if kind in ("LDS", "STS"):
        total.shared += _bytes(opcode)
    elif kind in ("LDSM", "STSM"):
        matrices = opcode.rsplit(".", 1)[-1]  # of 8 × 8 numbers, a lane of each row
        total.shared += 4 * (int(matrices) if matrices.isdigit() else 1)
    elif kind in ("BAR", "UCGABAR_WAIT"):
        total.barriers += "ARV" not in opcode
    elif kind == "FFMA" or kind == "FFMA2":
        total.multiply_adds += 2 if kind == "FFMA2" else 1
    elif kind == "HGMMA":
        m, n, k = map(int, _HGMMA.match(opcode).groups())
        total.tensor += 1
        total.drained = total.drained or 0
        total.tensor_flops += 2.0 * m * n * k / 4  # a group of four warps
    elif kind == "HMMA":
        m_n_k = _HMMA[opcode.split(".")[1]]
        total.tensor += 1
        total.tensor_flops += 2.0 * m_n_k
        total.warp_flops += 2.0 * m_n_k
    elif kind in ("UTCHMMA", "UTCQMMA"):
        total.tensor += 1
        total.tensor_flops = None
    elif opcode.startswith("WARPGROUP.DEPBAR") and instruction.operands.endswith("0x0"):
        total.drained = (total.drained or 0) + 1


_MFMA = re.compile(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)")
_DS = re.compile(r"ds_(?:read|write|load|store)(2?)\w*?_[bui](8|16|32|64|96|128)")


def _add_amd(total: Costs, instruction: Instruction) -> None:
    opcode = instruction.opcode
    if match := _DS.match(opcode):
        total.shared += int(match[2]) // 8 * (2 if match[1] else 1)
    elif opcode == "s_barrier":
        total.barriers += 1
    elif match := _MFMA.match(opcode):
        m, n, k = map(int, match.groups())
        total.tensor += 1
        total.tensor_flops += 2.0 * m * n * k
    elif re.match(r"v_(?:fma|fmac|mad|mac)_f32", opcode):
        total.multiply_adds += 1
    elif opcode.startswith("v_pk_fma_f32"):
        total.multiply_adds += 2
