"""Where things stand: what lies at the top of the package, which room may import which, and no circles."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOP = {"__init__.py", "api.py", "cli.py", "metrics.py", "parity.py", "py.typed"}
LAZY_CIRCLES = [  # of imports within a function
    {"vtok_fast.io.token_windows", "vtok_fast.io.tokens"},  # Tokens.load
    {"vtok_fast.models.vidtok.model", "vtok_fast.models.vidtok.stream"},  # VidTok.stream
]
# What a room does not import, at whatever place in a file.
ABOVE = ("vtok_fast.models", "vtok_fast.swap", "vtok_fast.commands", "vtok_fast.bench")
FORBIDDEN = {
    "reference": ("vtok_fast",),
    "dispatch": ("vtok_fast.ops", "vtok_fast.models"),
    "io": ("vtok_fast.models", "vtok_fast.commands"),
    "kernels": ABOVE,
    "ops": ABOVE,
    "models": ABOVE[1:],
}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


# An installation has the folder kernels/ as vtok_fast.kernels.
FILES = {name_of(file): file for file in (ROOT / "vtok_fast").rglob("*.py")}
FILES |= {f"vtok_fast.{name_of(file)}": file for file in (ROOT / "kernels").rglob("*.py")}


def statements(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The imports of a file, and whether they wait: within a function, or for a type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, lazy
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from statements(child, True)
        else:
            yield from statements(child, lazy or isinstance(child, (ast.FunctionDef, ast.Lambda)))


def imports(name: str) -> Iterator[tuple[str, bool]]:
    """The modules that a file imports: `from a import b` is a.b where that is a module."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node, lazy in statements(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names)
            continue
        above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        module = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{module}.{alias.name}"
            yield inner if inner in FILES else module, lazy


GRAPH = {name: set(imports(name)) for name in FILES}


def reached(graph: dict[str, set[str]], *start: str) -> set[str]:
    found, open_ = set(), [*start]
    while open_:
        new = graph.get(open_.pop(), set()) - found
        found, open_ = found | new, [*open_, *new]
    return found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of files, of two or more, that all reach one another."""
    reach = {name: reached(graph, name) for name in graph}
    sets = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in graph if a in reach[a]}
    return sorted(map(set, sets), key=sorted)


def violations(graph: dict[str, set[str]]) -> list[str]:
    within = lambda name, room: name == room or name.startswith(f"{room}.")
    return [
        f"{name} imports {to}"
        for room, rooms in FORBIDDEN.items()
        for name, targets in graph.items()
        for to in sorted(targets)
        if within(name, f"vtok_fast.{room}")
        and not within(to, f"vtok_fast.{room}")
        and any(within(to, other) for other in rooms)
    ]


EVERYTHING = {name: {to for to, _ in edges} for name, edges in GRAPH.items()}
EAGER = {name: {to for to, lazy in edges if not lazy} for name, edges in GRAPH.items()}


def test_no_circles():
    assert circles(EAGER) == [] and circles(EVERYTHING) == LAZY_CIRCLES
    files, parity = "vtok_fast.io.files", "vtok_fast.parity"
    assert circles(EAGER | {files: {parity}, parity: {files}}) == [{files, parity}]


def test_rooms_import_downwards():
    assert violations(EVERYTHING) == []
    for room, others in FORBIDDEN.items():
        assert violations({f"vtok_fast.{room}.some": {f"{others[-1]}.file"}}), room


def test_the_doctor_needs_no_torch():
    """Nor anything else that is not of Python: it runs where packages are missing or broken."""
    rooms = [name for name in FILES if "installation" in name]
    needed = {name.partition(".")[0] for name in reached(EAGER, *rooms)}
    beside = {
        name.rpartition(".")[2] for name in rooms
    }  # as a file, run by itself, it finds its neighbors so
    assert "sysconfig" in needed and needed <= sys.stdlib_module_names | beside | {"vtok_fast"}


def test_nothing_lies_loose():
    files = {
        file.name for file in (ROOT / "vtok_fast").iterdir() if file.is_file() and not file.match("_C*.so")
    }
    assert files == TOP
