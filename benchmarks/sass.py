"""Loops in SASS, the machine code of NVIDIA's GPUs, as `nvdisasm -c` prints it.

A loop is what lies between the target of a backward branch and that branch. Tensor-core instructions are HMMA here
(mma.sync m16n8k16 is one of them).
"""

import re
from dataclasses import dataclass

FUNCTION = re.compile(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", re.MULTILINE | re.DOTALL)
LABEL = re.compile(r"\s*(\.L_\w+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")  # predicate, opcode, operands
BRANCH_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Loop:
    """The opcodes of a loop's instructions with their modifiers, `HMMA.16816.F32.BF16` for one."""

    opcodes: tuple[str, ...]

    def count(self, opcode: str) -> int:
        """Instructions with this opcode, whatever their modifiers."""
        return sum(name.partition(".")[0] == opcode for name in self.opcodes)

    @property
    def per_hmma(self) -> float:
        """Instructions for each HMMA, itself included."""
        return len(self.opcodes) / self.count("HMMA")


def functions(sass: str) -> dict[str, str]:
    """The text of each kernel, by its mangled name."""
    return {match[1]: match[2] for match in FUNCTION.finditer(sass)}


def hmma_loops(function: str) -> list[Loop]:
    """The loops of one kernel that contain an HMMA and no smaller loop that does, in the order of their ends."""
    labels, instructions = {}, []
    for line in function.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append((instruction[1], instruction[2]))
    spans = []
    for end, (opcode, operands) in enumerate(instructions):
        target = BRANCH_TARGET.search(operands) if opcode.startswith("BRA") else None
        if target and labels.get(target[1], end + 1) <= end:
            spans.append((labels[target[1]], end))
    loops = {(a, b): Loop(tuple(opcode for opcode, _ in instructions[a : b + 1])) for a, b in spans}
    loops = {span: loop for span, loop in loops.items() if loop.count("HMMA")}

    def has_inner(span):
        return any(span[0] <= a and b <= span[1] for a, b in loops if (a, b) != span)

    return [loop for span, loop in loops.items() if not has_inner(span)]


def steady_loop(function: str) -> Loop | None:
    """The loop over the tiles that need no mask: of the innermost ones with HMMA the one with the least beside them."""
    return min(hmma_loops(function), key=lambda loop: loop.per_hmma, default=None)
