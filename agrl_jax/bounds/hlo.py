"""Counts the bytes that a compiled program moves, in memory and in collectives, from its HLO text.

`cost_analysis()` of a compiled program counts the body of a loop once. This module counts each computation as often as
it runs. The trip count of a loop is the one that the compiler notes, or else the constant to which the loop's counter
is compared. For a loop that may end early, this constant is an upper bound.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# Bits of an element; other types (tokens, opaque handles) have no size.
_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16, "u16": 16, "f16": 16,
    "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64,
}  # fmt: skip
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
                "collective-broadcast")  # fmt: skip
_FREE = {  # these move nothing, or the instructions that they call are counted instead
    "parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "domain", "while", "conditional", "call",
}  # fmt: skip
_BOOKKEEPING = ("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding", "SPMDFullToShardShape")  # custom calls
_LAZY = ("bitcast", "convert", "copy", "reshape", "transpose")  # in a fusion, these are computed where they are used
_SLICES = ("dynamic-slice", "slice", "gather")  # these read only what they return

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
_MEMORY = re.compile(r"S\((\d+)\)")


class _Array(NamedTuple):
    """One array in the type of an instruction."""

    moved: int  # its bytes if it is in main memory, or else 0
    size: int  # its bytes, wherever it is


@dataclass(frozen=True)
class _Instruction:
    name: str
    root: bool
    op: str
    arrays: tuple[_Array, ...]
    operands: tuple[str, ...]
    text: str  # from the operands to the end of the line

    def attribute(self, name: str) -> str | None:
        """The name in an attribute such as `body=`."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return None if found is None else found[1]

    @property
    def scope(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.text)
        return "" if found is None else found[1]

    @property
    def continues(self) -> bool:
        """Whether this is a later part of a collective that TPUs spread over fusions; each part has the whole type."""
        return re.search(r'"async_collective_fusion_config":\{"flag_start":"\d', self.text) is not None

    @property
    def moved(self) -> int:
        return sum(array.moved for array in self.arrays)

    @property
    def size(self) -> int:
        return sum(array.size for array in self.arrays)


Computation = Mapping[str, _Instruction]


@dataclass
class Traffic:
    """What one device moves in one phase."""

    bytes: float = 0.0  # of its memory, read and written
    collectives: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # bytes that it sends, by kind


def traffic(text: str, phases: Sequence[str], branch_share: float = 1.0) -> dict[str, Traffic]:
    """What one device moves in each phase, and in "other", from a compiled program's HLO text.

    An instruction belongs to the first phase in its scope (`jax.named_scope`), or else to the phase of the loop or
    branch that holds it. `branch_share` is the share of runs in which the first branch of a conditional is not taken.
    Raises ValueError for a loop of unknown trip count.
    """
    computations, entry = parse(text)
    found: dict[str, Traffic] = defaultdict(Traffic)

    def walk(name: str, times: float, phase: str) -> None:
        computation = computations[name]
        for instruction in computation.values():
            own = phase_of(instruction.scope, phases) or phase
            if instruction.op == "while":
                trips = trip_count(instruction, computations)
                walk(instruction.attribute("body"), times * trips, own)
                walk(instruction.attribute("condition"), times * trips, own)
            elif instruction.op == "conditional":
                first, *others = _branches(instruction)
                walk(first, times * (1 - branch_share), own)
                for other in others:
                    walk(other, times * branch_share / len(others), own)
            elif instruction.op in ("call", "async-start"):
                walk(instruction.attribute("to_apply") or instruction.attribute("calls"), times, own)
            else:
                found[own].bytes += times * _moved(instruction, computation, computations)
                for each in _with_fused(instruction, computations):
                    kind = each.op.removesuffix("-start")
                    if kind in _COLLECTIVES and not each.continues:
                        found[own].collectives[kind] += times * _sent(each, kind)

    walk(entry, 1.0, "other")
    return dict(found)


def phase_of(scope: str, phases: Sequence[str]) -> str | None:
    """The first part of a scope such as `jit(step)/decode/while` that is one of `phases`."""
    return next((part for part in scope.split("/") if part in phases), None)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, each with its instructions by name, and the name of the first to run."""
    computations: dict[str, dict[str, _Instruction]] = {}
    current, entry = {}, ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif (match := _LINE.match(line)) and not line.startswith("}"):
            instruction = _instruction(match[2], bool(match[1]), match[3])
            current[instruction.name] = instruction
    return computations, entry


def trip_count(loop: _Instruction, computations: Mapping[str, Computation]) -> int:
    """How often the body of a `while` runs, at most."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
        return int(noted[1])
    condition = computations[loop.attribute("condition")]
    counts = [
        int(each.text.split(")")[0])
        for outer in condition.values()
        for each in _with_fused(outer, computations)
        if each.op == "constant" and re.fullmatch(r"\d+", each.text.split(")")[0])
    ]
    if not counts:
        raise ValueError(f"the loop {loop.name} ({loop.scope}) compares its counter to no constant")
    return max(counts)


# ------------------------------------------------------------------------------------------- helpers


def _instruction(name: str, root: bool, rest: str) -> _Instruction:
    cut = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    op, _, tail = rest[cut:].strip().partition("(")
    end = _closing("(" + tail) - 1
    operands = tuple(re.findall(r"%([\w.\-]+)", tail[:end])) if op != "constant" else ()
    return _Instruction(name, root, op, tuple(_arrays(rest[:cut])), operands, tail)


def _closing(text: str) -> int:
    """The index at which the parenthesis that opens `text` closes."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place
    raise ValueError(f"unbalanced: {text[:80]}")


def _arrays(shape: str) -> Iterator[_Array]:
    for dtype, dims, layout in _ARRAY.findall(shape):
        number = math.prod(int(dim) for dim in dims.split(",") if dim)
        size = number * _BITS.get(dtype, 0) // 8
        memory = _MEMORY.search(layout)
        yield _Array(size if memory is None or memory[1] == "0" else 0, size)


def _branches(instruction: _Instruction) -> list[str]:
    """The branches of a conditional, the one for False first."""
    if listed := re.search(r"branch_computations=\{([^}]*)\}", instruction.text):
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return [instruction.attribute("false_computation"), instruction.attribute("true_computation")]


def _with_fused(instruction: _Instruction, computations: Mapping[str, Computation]) -> Iterator[_Instruction]:
    """An instruction and, if it is a fusion, the instructions in it."""
    yield instruction
    if instruction.op == "fusion":
        for inner in computations[instruction.attribute("calls")].values():
            yield from _with_fused(inner, computations)


def _moved(instruction: _Instruction, computation: Computation, computations: Mapping[str, Computation]) -> float:
    """Bytes of main memory that an instruction reads and writes."""
    op = instruction.op
    if op in _FREE or op.endswith("-done"):
        return 0
    if op == "custom-call" and any(target in instruction.text for target in _BOOKKEEPING):
        return 0
    operands = [computation[name] for name in instruction.operands if name in computation]
    if op == "fusion":
        fused = computations[instruction.attribute("calls")]
        read = sum(_used(i, each.moved, fused, computations) for i, each in enumerate(operands) if each.moved)
        return _written(instruction, fused) + read
    if op == "copy-start":  # its type is (to, from, context)
        return instruction.moved
    if op.removesuffix("-start") in _SLICES:
        piece = instruction.arrays[-2 if op.endswith("-start") else -1]
        return piece.moved + (piece.size if operands[0].moved else 0) + sum(each.moved for each in operands[1:])
    if op == "dynamic-update-slice":
        return operands[1].moved + (operands[1].size if instruction.moved else 0)
    if op == "scatter":
        updates = operands[len(operands) // 2 + 1 :]
        return 3 * sum(each.size for each in updates if instruction.moved)  # reads them, reads and writes their places
    written = 0 if op.endswith("-start") else instruction.moved
    return written + sum(operand.moved for operand in operands)


def _used(
    source: int | str, whole: float, fused: Computation, computations: Mapping[str, Computation]
) -> float:
    """Bytes that a fusion reads of a parameter or of a result in it: `whole`, or less if it only takes slices.

    `source` is the number of the parameter or the name of the result.
    """
    if isinstance(source, int):
        parameters = (each for each in fused.values() if each.op == "parameter")
        source = next(each.name for each in parameters if each.text.startswith(f"{source})"))
    total = 0.0
    for user in fused.values():
        for place, name in enumerate(user.operands):
            if name != source:
                continue
            if user.continues or (user.op == "tuple" and user.root):
                continue  # a part of what began before, or a result that is handed on in place
            if user.op == "fusion":
                total += _used(place, whole, computations[user.attribute("calls")], computations)
            elif user.op in _LAZY and not user.root:
                total += _used(user.name, whole, fused, computations)
            elif user.op in _SLICES and place == 0:
                total += user.size
            elif user.op != "dynamic-update-slice" or place:  # an update does not read what it updates in place
                return whole
    return min(total, whole)


def _written(instruction: _Instruction, fused: Computation) -> float:
    """Bytes that a fusion writes; for an update in place, only the bytes of the update."""
    root = next(each for each in fused.values() if each.root)
    parts = [fused[name] for name in root.operands] if root.op == "tuple" else [root]
    if len(parts) != len(instruction.arrays):
        return instruction.moved
    total = 0.0
    for part, array in zip(parts, instruction.arrays, strict=True):
        while part.op == "bitcast":
            part = fused[part.operands[0]]
        if part.continues or part.op == "parameter":
            continue
        updated = part.op == "dynamic-update-slice" and array.moved
        total += min(fused[part.operands[1]].size, array.moved) if updated else array.moved
    return total


def _sent(instruction: _Instruction, kind: str) -> float:
    """The least bytes that each device of a group must send, in a ring."""
    others = 1 - 1 / _group_size(instruction)
    largest = max(array.size for array in instruction.arrays)
    if kind == "all-gather":
        whole = sum(array.size for array in instruction.arrays if not instruction.op.endswith("-start")) or largest
        return whole * others
    if kind == "reduce-scatter":
        return instruction.size * _group_size(instruction) * others
    if instruction.op == "collective-permute-start":
        return largest
    return instruction.size * (2 * others if kind == "all-reduce" else others if "all-to-all" in kind else 1)


def _group_size(instruction: _Instruction) -> int:
    """Devices that take part in a collective together."""
    text = instruction.text
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes[2]))
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(tiled[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(listed[1].split(","))
    return 2
