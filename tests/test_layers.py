"""The layers of docs/architecture.md: a file imports from its own row or from lower ones, and never in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The lowest row first. A module belongs to the row of the longest of these names that it starts with.
ROWS = (
    (
        "_arrays",
        "_checks",
        "_choices",
        "_dtypes",
        "_files",
        "_html",
        "_packages",
        "_registry",
        "_signals",
        "_transfer",
        "recipe",
    ),
    ("reference", "kernels"),
    ("ops",),
    ("linalg",),
    ("nn", "objectives"),
    ("lipschitz", "penalties"),
    ("metrics",),
    ("data", "models"),
    ("systems",),
    ("recipes",),
    ("training",),
    ("studies",),
    ("commands", "compat"),
    ("bench",),
    ("__main__",),
)
# Other names of modules: each holds imports and nothing else.
ALIASES = ("cli", "distributed", "divergences", "losses", "regularizers")


def _modules() -> dict[str, Path]:
    """Every module of the package by its name without the leading ``lipgan.``; the package itself is ""."""
    found = {}
    for folder, prefix in ((ROOT / "lipgan", ()), (ROOT / "kernels", ("kernels",))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imports(name: str) -> list[tuple[str, int]]:
    """The modules of the package that a module imports, wherever in the file, with the line."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names if alias.name.split(".")[0] == "lipgan"]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = ["lipgan", *package.split(".")]
                base = ".".join(parts[: len(parts) - node.level + 1])
                source = f"{base}.{node.module}" if node.module else base
            else:
                source = node.module or ""
            targets = [f"{source}.{alias.name}" for alias in node.names if source.split(".")[0] == "lipgan"]
        else:
            continue
        for target in targets:
            target = target.partition(".")[2]
            # The name may be a module, or something in one.
            while target and target not in MODULES:
                target = target.rpartition(".")[0]
            if target not in ("", name):
                found.append((target, node.lineno))
    return found


def _row(name: str) -> int:
    rows = {prefix: row for row, prefixes in enumerate(ROWS) for prefix in prefixes}
    while name not in rows:
        name = name.rpartition(".")[0]
        assert name, "a module without a row"
    return rows[name]


LAYERED = sorted(name for name in MODULES if name not in ("", *ALIASES))


@pytest.mark.parametrize("name", LAYERED)
def test_imports_come_from_the_own_row_or_from_below_it(name: str) -> None:
    climbs = [f"{target}, line {line}" for target, line in _imports(name) if _row(target) > _row(name)]
    assert not climbs, f"lipgan.{name} is in row {_row(name)} and imports from higher rows: {climbs}"


def test_there_are_no_circles() -> None:
    # A package's __init__ gathers its modules, which may import each other: only modules are nodes, and the package
    # stands for what it gathers.
    graph = {name: sorted({target for target, _ in _imports(name)}) for name in LAYERED}
    for name, targets in graph.items():
        inside = name.split(".")[0]
        graph[name] = [target for target in targets if MODULES[target].name != "__init__.py" or _top(target) != inside]
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for target in graph.get(name, []):
            visit(target, [*path, name])
        done.add(name)

    for name in graph:
        visit(name, [])


def _top(name: str) -> str:
    return name.split(".")[0]


def test_modules_do_not_import_the_package_that_gathers_them() -> None:
    """Within a package, modules import modules: its __init__ imports them all, and the first would close a circle."""
    for name in LAYERED:
        if MODULES[name].name == "__init__.py":
            continue
        parents = {name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)}
        found = [f"{target}, line {line}" for target, line in _imports(name) if target in parents]
        assert not found, f"lipgan.{name} imports its own package: {found}"


@pytest.mark.parametrize("name", ALIASES)
def test_aliases_are_imports_and_nothing_else(name: str) -> None:
    body = ast.parse(MODULES[name].read_text()).body
    assert all(isinstance(node, ast.ImportFrom) for node in body[1:])
    assert isinstance(body[0], ast.Expr)


def test_the_table_is_the_one_that_the_documentation_shows() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page[page.index("<!-- layers -->") :]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    shown = [tuple(name.strip("` ") for name in line.split("|")[1].split(",")) for line in rows[: len(ROWS)]]
    assert shown == [tuple(row) for row in ROWS]
