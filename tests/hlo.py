"""Reading optimized HLO: what a compiled program does in its loops, and what it keeps in memory."""

import math
import re


def computations(hlo):
    """Split a module into its computations, {name: lines}, without the insides of fusions, whose values are never in memory."""
    found, lines = {}, []
    for line in hlo.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            lines = found.setdefault(header[1], [])
        else:
            lines.append(line)
    fused = set(re.findall(r" fusion\(.*?calls=%?([\w.\-]+)", hlo))
    return {name: lines for name, lines in found.items() if name not in fused}


def loop_lines(hlo):
    """All lines of the bodies of while loops and of what these call."""
    found = computations(hlo)
    seen, ahead = [], re.findall(r"body=%?([\w.\-]+)", hlo)
    assert ahead, "no loop in the program"
    while ahead:
        name = ahead.pop()
        if name in found and name not in seen:
            seen.append(name)
            text = "\n".join(found[name])
            ahead += re.findall(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)", text)
            ahead += re.findall(r"%([\w.\-]+)", " ".join(re.findall(r"branch_computations=\{([^}]*)\}", text)))
    return [line for name in seen for line in found[name]]


def operations(lines):
    """Yield (opcode, dtype, dimensions without ones) of every array-valued operation."""
    for line in lines:
        match = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(", line)
        if match:
            dtype, dimensions, opcode = match.groups()
            yield opcode, dtype, tuple(int(n) for n in dimensions.split(",") if n not in ("", "1"))


HOST_OPERATIONS = re.compile(
    r" (infeed|outfeed|send|send-done|recv|recv-done)\(|custom_call_target=\"[^\"]*(callback|python)[^\"]*\""
)


def cache_copies(hlo, cache):
    """Copies, also transposed or widened ones, of a whole cache of these dimensions (ones left out) within a loop."""
    found = [operation for operation in operations(loop_lines(hlo)) if sorted(operation[2]) == sorted(cache)]
    return [operation for operation in found if operation[0] in ("copy", "copy-start") or operation[1] == "f32"]


def widened(hlo, shapes):
    """f32 arrays of a weight's shape, transposed or not, anywhere in the program."""
    shapes = set(shapes) | {shape[::-1] for shape in shapes}
    lines = [line for lines in computations(hlo).values() for line in lines]
    return [operation for operation in operations(lines) if operation[1] == "f32" and operation[2] in shapes]


def decoded(hlo, sizes):
    """Floats in as many elements as a weight has, made anywhere in the program, but for those in a TPU's on-chip memory."""
    lines = [line for lines in computations(hlo).values() for line in lines if not re.match(r"[^=]+= \w+\[[^ ]*S\(1\)\} ", line)]
    made = [operation for operation in operations(lines) if operation[0] not in ("parameter", "get-tuple-element", "bitcast")]
    return [operation for operation in made if operation[1] in ("bf16", "f16", "f32") and math.prod(operation[2]) in sizes]


def aliased(hlo, dtype, dimensions):
    """Return (numbers of the program's arguments of this type, numbers of those that an output takes the place of)."""
    layout = re.search(r"entry_computation_layout=\{\((.*?)\)->", hlo)[1]
    layout = re.sub(r"/\*.*?\*/", "", layout)
    parameters = re.findall(r"(\w+)\[([\d,]*)\]", layout)
    wanted = (dtype, ",".join(map(str, dimensions)))
    found = {i for i, parameter in enumerate(parameters) if parameter == wanted}
    aliases = re.search(r"input_output_alias=\{(.*?\)) \}", hlo)
    return found, found & {int(i) for i in re.findall(r": \((\d+),", aliases[1])} if aliases else set()
