"""Every ErrorInfo reason that the code can emit, read out of its sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("client", "protos", "router", "stage")
_REASON = re.compile(r"[A-Z]+(_[A-Z]+)*$")


def reasons_in_code() -> dict[str, set[str]]:
    """Reasons, with the files that have them: constants given as `reason`, by name or by position."""
    found: dict[str, set[str]] = {}
    for root in SOURCES:
        for path in (ROOT / root).rglob("*.py"):
            if path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
                continue
            for reason in _reasons(ast.parse(path.read_text())):
                found.setdefault(reason, set()).add(str(path.relative_to(ROOT)))
    return found


def _reasons(module: ast.Module) -> Iterator[str]:
    positions = dict(_positions(module))
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        values = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        position = positions.get(name)
        if position is not None and position < len(node.args):
            values.append(node.args[position])
        for value in values:
            for constant in ast.walk(value):  # also both sides of "A if b else C"
                text = constant.value if isinstance(constant, ast.Constant) else None
                if isinstance(text, str) and _REASON.match(text):
                    yield text


def _positions(module: ast.Module) -> Iterator[tuple[str, int]]:
    """Functions of the module that take a reason by position, and where."""
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
            if "reason" in names:
                yield node.name, names.index("reason")
