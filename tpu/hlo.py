"""Figures of a compiled program, read from its optimized HLO text: time by operation, bytes that chips exchange.

The TPU compiler writes `estimated_cycles` into the `backend_config` of the operations that it schedules. The cycles of
a fusion are those of everything fused in it; a loop's are those of its body, times its trips. A kernel written by hand
has no cycles, but the FLOPs and bytes that its author estimates.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_DTYPE_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+|f8\w+)\[([\d,]*)\]")
_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"\bcondition=%([\w.\-]+)")
_BELOW = re.compile(r"[^)]*%([\w.\-]+)\), direction=LT")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"\d+","bytes_accessed":"(\d+)"')
_OPERANDS = re.compile(r"operand_layout_constraints=\{(.*?\})\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Kernel:
    """A kernel written by hand, such as one of Pallas.

    Attributes:
        name: The kernel's name.
        shapes: Shapes of its operands.
        flops: FLOPs of one execution, as its author estimates; None without an estimate.
        bytes_accessed: Bytes read and written by one execution, likewise.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    flops: int | None
    bytes_accessed: int | None


@dataclass(frozen=True)
class Operation:
    """One scheduled operation.

    Attributes:
        name: Its name in the program.
        opcode: Kind of operation: fusion, copy, custom-call, all-reduce, …
        module: Path of the layer that it came from, such as `transpose(unet)/down_blocks_0/attentions_0`.
        cycles: Cycles that the compiler expects of all its executions in one run of the program.
        count: Executions in one run of the program.
        bytes_exchanged: Bytes that exchanges between devices leave on one device, summed over all executions.
        kernel: The kernel that it runs, where that was written by hand.
    """

    name: str
    opcode: str
    module: str
    cycles: int
    count: int
    bytes_exchanged: int
    kernel: Kernel | None = None


@dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    rest: str


def operations(text: str) -> list[Operation]:
    """Return all operations that a program schedules, in order.

    Args:
        text: Optimized HLO, from `compiled.as_text()`.

    Raises:
        ValueError: If it has no entry computation.
    """
    computations, entry = _parse(text)
    return list(_walk(computations, entry, 1, set(), scheduled=True))


def loops(text: str) -> list[int]:
    """Return how often each loop of a program runs, when it is met once.

    Args:
        text: Optimized HLO, from `compiled.as_text()`.

    Raises:
        ValueError: If it has no entry computation, or a loop of which nothing says that.
    """
    computations, _ = _parse(text)
    steps = (step for steps in computations.values() for step in steps if step.opcode == "while")
    return [_trips(computations, step) for step in steps]


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None:
            instruction = _INSTRUCTION.match(line)
            if instruction:
                kind, rest = _split_type(instruction[2])
                opcode, _, rest = rest.partition("(")
                current.append(_Instruction(instruction[1], kind, opcode.strip(), rest))
    if entry is None:
        raise ValueError("the text holds no entry computation")
    return computations, entry


def _split_type(text: str) -> tuple[str, str]:
    """Split a type, which may be a tuple with parentheses in its layouts, from what follows it."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: place + 1], text[place + 1 :]
    raise ValueError(f"a type that does not end: {text[:80]}")


def _walk(
    computations: dict[str, list[_Instruction]], name: str, count: int, channels: set[str], *, scheduled: bool
) -> Iterator[Operation]:
    """Yield the operations of a computation; inside a fusion, whose cycles include theirs, only the exchanges.

    An exchange that runs beside several fusions is written in each of them; `channels` collects those that were seen.
    """
    for instruction in computations[name]:
        cycles, exchanged, kernel = (
            _CYCLES.search(instruction.rest),
            _bytes_exchanged(instruction),
            _kernel(instruction),
        )
        channel = _CHANNEL.search(instruction.rest)
        if exchanged and channel:
            exchanged = 0 if channel[1] in channels else exchanged
            channels.add(channel[1])
        if (cycles and scheduled) or exchanged or kernel:
            op_name = _OP_NAME.search(instruction.rest)
            yield Operation(
                name=instruction.name,
                opcode=instruction.opcode,
                module=module_path(op_name[1]) if op_name else "",
                cycles=count * int(cycles[1]) if cycles and scheduled else 0,
                count=count,
                bytes_exchanged=count * exchanged,
                kernel=kernel,
            )
        times = count * _trips(computations, instruction)
        called = _CALLED.findall(instruction.rest)
        branches = _BRANCHES.search(instruction.rest)
        called += re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
        for inner in called:
            if inner in computations:
                yield from _walk(
                    computations, inner, times, channels, scheduled=scheduled and instruction.opcode != "fusion"
                )


def _trips(computations: dict[str, list[_Instruction]], instruction: _Instruction) -> int:
    """Return how often a loop runs: as the compiler notes, or else by its condition, where JAX counts up from 0.

    Raises:
        ValueError: For a loop of which neither says that.
    """
    if instruction.opcode != "while":
        return 1
    noted = _TRIPS.search(instruction.rest)
    if noted:
        return int(noted[1])
    condition = _CONDITION.search(instruction.rest)
    steps = computations.get(condition[1], []) if condition else []
    constants = {step.name: step.rest.partition(")")[0] for step in steps if step.opcode == "constant"}
    bound = _BELOW.match(steps[-1].rest) if steps and steps[-1].opcode == "compare" else None
    if bound is None or not constants.get(bound[1], "").isdigit():
        raise ValueError(f"nothing says how often the loop {instruction.name} runs")
    return int(constants[bound[1]])


def _kernel(instruction: _Instruction) -> Kernel | None:
    if instruction.opcode != "custom-call" or 'custom_call_target="tpu_custom_call"' not in instruction.rest:
        return None
    operands, estimate = _OPERANDS.search(instruction.rest), _ESTIMATE.search(instruction.rest)
    return Kernel(
        name=instruction.name.split(".")[0],
        shapes=tuple(
            tuple(int(size) for size in shape.split(",") if size)
            for _, shape in _ARRAY.findall(operands[1] if operands else "")
        ),
        flops=int(estimate[1]) if estimate else None,
        bytes_accessed=int(estimate[2]) if estimate else None,
    )


def _bytes_exchanged(instruction: _Instruction) -> int:
    """Return the bytes of a collective's result; an asynchronous start, other than of all-reduce, holds them twice."""
    for kind in _COLLECTIVES:
        if instruction.opcode == kind:
            return array_bytes(instruction.type)
        if instruction.opcode == f"{kind}-start":
            return array_bytes(instruction.type) // (1 if kind == "all-reduce" else 2)
    return 0


def array_bytes(kind: str) -> int:
    """Return the bytes of all arrays in an HLO type, such as `(f32[2,3], s32[])`, without padding."""
    total = 0
    for dtype, shape in _ARRAY.findall(kind):
        width = _DTYPE_BYTES.get(dtype) or (1 if dtype.startswith("f8") else max(1, int(dtype[1:]) // 8))
        total += width * math.prod(int(size) for size in shape.split(",") if size)
    return total


def module_path(op_name: str) -> str:
    """Return the layer's path in an operation's name.

    `jit(train_step)/transpose(jvp(FlaxUNet2DConditionModel))/conv_out/reduce_sum` is
    `transpose(FlaxUNet2DConditionModel)/conv_out`.
    """
    parts = [
        part for part in op_name.split("/") if not part.startswith(("jit(", "pjit", "while", "body", "closed_call"))
    ]
    parts = [re.sub(r"\bjvp\(([^()]*)\)", r"\1", part) for part in parts]
    return "/".join(part for part in parts[:-1] if part)
