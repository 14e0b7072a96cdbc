"""The way through a kernel: its loops, and the longest path outside and inside of them.

Which branches are taken is not known. The longest path is: every step of a kernel that has work is on it,
and of branches that exclude each other the longer one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tools.compile_check.machine_code import Instruction


@dataclass
class Stretch:
    """A kernel, or a loop of it: what is executed in one pass, without the loops inside.

    Attributes:
        instructions: of the longest path, in the order of their addresses.
        loops: loops on that path, in the same order.
    """

    instructions: list[Instruction]
    loops: list[Stretch] = field(default_factory=list)

    def everything(self) -> list[Stretch]:
        """This stretch and all loops in it, however deep, from the outside in."""
        return [self, *(inner for loop in self.loops for inner in loop.everything())]


def stretches(code: Sequence[Instruction]) -> Stretch:
    """Find the loops of a kernel and the path through it.

    Raises:
        ValueError: there are no instructions.
    """
    if not code:
        raise ValueError("no instructions in what the disassembler printed")
    return _Graph(code).walk()


class _Graph:
    """Basic blocks by number, 0 the entry."""

    def __init__(self, code: Sequence[Instruction]):
        places = {instruction.address: place for place, instruction in enumerate(code)}
        starts = {0}
        for place, instruction in enumerate(code):
            if instruction.jump is not None or instruction.ends:
                starts.add(place + 1)
            if instruction.jump in places:
                starts.add(places[instruction.jump])
        starts = sorted(start for start in starts if start < len(code))
        self.blocks = [
            list(code[start:end]) for start, end in zip(starts, [*starts[1:], len(code)], strict=True)
        ]
        number = {start: block for block, start in enumerate(starts)}
        self.successors: list[list[int]] = []
        for block, instructions in enumerate(self.blocks):
            last, following = instructions[-1], []
            if last.falls_through and block + 1 < len(self.blocks):
                following.append(block + 1)
            if last.jump in places:
                following.append(number[places[last.jump]])
            self.successors.append(list(dict.fromkeys(following)))
        self._find_loops()

    def _find_loops(self) -> None:
        """``order``: blocks, predecessors first but for back edges; ``loops``: blocks by header."""
        order, seen, stack = [], {0}, [(0, iter(self.successors[0]))]
        while stack:
            block, rest = stack[-1]
            following = next(rest, None)
            if following is None:
                order.append(block)
                stack.pop()
            elif following not in seen:
                seen.add(following)
                stack.append((following, iter(self.successors[following])))
        self.order = order[::-1]
        predecessors: dict[int, list[int]] = {block: [] for block in self.order}
        for block in self.order:
            for following in self.successors[block]:
                predecessors[following].append(block)
        dominators = {block: set(self.order) for block in self.order}
        dominators[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                new = {block} | set.intersection(*(dominators[before] for before in predecessors[block]))
                changed |= new != dominators[block]
                dominators[block] = new
        self.loops: dict[int, set[int]] = {}
        for latch in self.order:
            for header in self.successors[latch]:
                if header in dominators[latch]:
                    body, todo = {header}, [latch]
                    while todo:
                        if (block := todo.pop()) not in body:
                            body.add(block)
                            todo += predecessors[block]
                    self.loops.setdefault(header, set()).update(body)

    def walk(self) -> Stretch:
        return self._stretch(None, set(self.order))

    def _stretch(self, header: int | None, blocks: set[int]) -> Stretch:
        """One pass through the loop at ``header``, or through the whole; loops inside count as one pass."""
        start = 0 if header is None else header
        # The outermost loops inside, each as one node by its header.
        inside = {h: body for h, body in self.loops.items() if h in blocks and h != header}
        outermost = {
            h: b for h, b in inside.items() if not any(h in o for k, o in inside.items() if k != h)
        }
        owner = {block: h for h, body in outermost.items() for block in body}
        loops = {h: self._stretch(h, body & blocks) for h, body in outermost.items()}

        def weight(node: int) -> int:
            if node in loops:
                return sum(len(stretch.instructions) for stretch in loops[node].everything())
            return len(self.blocks[node])

        # The longest way from the start to each node.
        length, before = {start: weight(start)}, {}
        last = start
        for block in self.order:
            node = owner.get(block, block)
            if block not in blocks or node not in length:
                continue
            for following in self.successors[block]:
                to = owner.get(following, following)
                if following not in blocks or to in (node, start):
                    continue
                if length[node] + weight(to) > length.get(to, 0):
                    length[to], before[to] = length[node] + weight(to), node
        ends = [n for n in length if self._leaves(n, header, loops, blocks)] or list(length)
        last = max(ends, key=lambda node: length[node])
        path = [last]
        while path[-1] != start:
            path.append(before[path[-1]])
        path.sort()
        own = [i for node in path if node not in loops for i in self.blocks[node]]
        return Stretch(own, [loops[node] for node in path if node in loops])

    def _leaves(self, node: int, header: int | None, loops: dict[int, Stretch], blocks: set[int]) -> bool:
        """Whether a pass ends behind this node: back to the loop's header, or at the end of the program."""
        members = self.loops[node] & blocks if node in loops else {node}
        if header is not None:
            return any(header in self.successors[block] for block in members)
        return any(self.blocks[block][-1].ends for block in members)
