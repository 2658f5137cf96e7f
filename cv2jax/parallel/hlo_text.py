"""Reading the text of an optimised HLO module (`compiled.as_text()`): computations, instructions, buffers."""

import dataclasses
import functools
import json
import math
import re
from typing import Any

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+)\s*\(.*\)\s*->\s*.*\{\s*$")
_LEFT = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True, slots=True)
class Buffer:
    """One array of an instruction's result: its type, sizes, layout ("1,0:T(8,128)S(1)")."""

    dtype: str
    sizes: tuple[int, ...]
    layout: str = ""

    @property
    def is_in_hbm(self) -> bool:
        """False in another memory space, S(n): a TPU's vector memory, scalars, the host."""
        found = re.search(r"S\((\d+)\)", self.layout)
        return found is None or found[1] == "0"

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return math.prod(self.sizes) * _bits(self.dtype) // 8

    @property
    def padded_bytes(self) -> int:
        """Of what it takes in memory: its minor axes rounded up to the layout's tile."""
        order, _, tiling = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", tiling)
        if tile is None or not self.sizes:
            return self.num_bytes
        sizes = list(self.sizes)
        minor_first = [int(axis) for axis in order.split(",") if axis]
        for axis, size in zip(minor_first, map(int, reversed(tile[1].split(","))), strict=False):
            sizes[axis] = -(-sizes[axis] // size) * size
        return math.prod(sizes) * _bits(self.dtype) // 8


@dataclasses.dataclass(slots=True)
class Instruction:
    """One line: its result's buffers (of a nested tuple all leaves), opcode, operands by name, the rest as text."""

    name: str
    opcode: str
    buffers: tuple[Buffer, ...]
    operands: tuple[str, ...]
    arguments: str  # what stands in its parentheses
    attributes: str
    is_root: bool

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it calls; of a while loop condition and body."""
        names = tuple(_CALLED.findall(self.attributes))
        branches = _BRANCHES.search(self.attributes)
        return names + (tuple(_NAME.findall(branches[1])) if branches else ())

    def attribute(self, name: str) -> str:
        """The text of `name={…}` with its braces, or of `name=…` up to the comma; "" where there is none."""
        found = re.search(rf"\b{name}=", self.attributes)
        if found is None:
            return ""
        rest = self.attributes[found.end() :]
        if rest.startswith("{"):
            return rest[: _closing(rest, "{", "}") + 1]
        return re.split(r",\s|\s", rest, maxsplit=1)[0].rstrip(",")

    @property
    def backend_config(self) -> dict[str, Any]:
        """Its JSON; {} where there is none."""
        try:
            made = json.loads(self.attribute("backend_config") or "{}")
        except ValueError:
            return {}
        return made if isinstance(made, dict) else {}


@dataclasses.dataclass
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose value it has."""
        last = next(reversed(self.instructions.values()))
        return next((one for one in self.instructions.values() if one.is_root), last)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        return {int(one.arguments): one for one in self.instructions.values() if one.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Of each instruction's name, who reads it."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for one in self.instructions.values():
            for operand in dict.fromkeys(one.operands):
                found.setdefault(operand, []).append(one)
        return found

    def operand(self, one: Instruction, index: int) -> Instruction | None:
        """An instruction's operand."""
        return self.instructions.get(one.operands[index]) if index < len(one.operands) else None


@dataclasses.dataclass
class Module:
    """An HLO module: its computations and which one runs."""

    computations: dict[str, Computation]
    entry: str
    num_partitions: int


def parse_hlo(text: str) -> Module:
    """The module of its text; ValueError where it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, current, last = "", None, None
    for line in text.splitlines():
        if current is None:
            head = _HEAD.match(line) if line.endswith("{") else None
            if head:
                current = Computation(head[2])
                computations[current.name] = current
                entry = current.name if head[1] else entry
        elif line == "}" or line.startswith("}, execution_thread"):
            current = None
        elif one := _parse_instruction(line):
            current.instructions[one.name] = last = one
        elif last is not None:  # a kernel's metadata is written over several lines
            last.attributes += line
    if not entry:
        raise ValueError("this is no text of an HLO module: it has no ENTRY computation")
    parts = re.search(r"num_partitions=(\d+)", text[:100_000].split("\n", 1)[0])
    return Module(computations, entry, int(parts[1]) if parts else 1)


def _parse_instruction(line: str) -> Instruction | None:
    left = _LEFT.match(line)
    if left is None:
        return None
    rest = line[left.end() :]
    end = _closing(rest, "(", ")") + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    closing = opening + _closing(rest[opening:], "(", ")")
    arguments = rest[opening + 1 : closing]
    return Instruction(
        name=left[2],
        opcode=rest[:opening].strip(),
        buffers=_buffers(kind),
        operands=tuple(_NAME.findall(arguments)),
        arguments=arguments,
        attributes=rest[closing + 1 :],
        is_root=left[1] is not None,
    )


@functools.lru_cache(maxsize=65536)
def _buffers(kind: str) -> tuple[Buffer, ...]:
    found = []
    for dtype, sizes, layout in _ARRAY.findall(kind):
        values = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        found.append(Buffer(dtype, values, layout))
    return tuple(found)


def _closing(text: str, opening: str, closing: str) -> int:
    """Where the bracket that `text` begins with closes; strings are skipped."""
    depth, quoted, index = 0, False, 0
    while index < len(text):
        character = text[index]
        if quoted and character == "\\":
            index += 1
        elif character == '"':
            quoted = not quoted
        elif not quoted and character == opening:
            depth += 1
        elif not quoted and character == closing:
            depth -= 1
            if not depth:
                return index
        index += 1
    return len(text) - 1


@functools.cache
def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 0
