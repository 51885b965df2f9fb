"""The house: which package may import which, and what has a docstring."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "cmi_lightning"
# Lightning is imported by the data modules, the training module and what lies above them.
SHELL = ("data", "training", "predict", "callbacks", "table", "cli", "api", "studio")
ABOVE = ("predict", "callbacks", "table", "cli", "api", "studio", "__main__")


def _files() -> dict[str, Path]:
    """Return {module: file}; callbacks/ and configs/ are parts of the package."""
    found = {}
    for folder, prefix in (
        (ROOT / PACKAGE, PACKAGE),
        (ROOT / "callbacks", f"{PACKAGE}.callbacks"),
        (ROOT / "configs", f"{PACKAGE}.configs"),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([prefix, *(part for part in parts if part != "__init__")])
            found[name] = path
    return found


FILES = _files()


def _imports(name: str) -> set[str]:
    """Return every module that a module imports, inside functions too, but not for types alone."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in FILES else node.module)
    return found


IMPORTS = {name: _imports(name) for name in FILES}


def _room(module: str) -> str:
    """Return the part of the package that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def test_lightning_is_imported_by_the_shell_alone():
    inside = {
        name
        for name, imports in IMPORTS.items()
        if any(i.split(".")[0] in ("lightning", "lightning_fabric") for i in imports)
    }
    assert {_room(name) for name in inside} <= set(SHELL)


@pytest.mark.parametrize(
    ("room", "never"),
    [
        ("report", ("table", "predict", "callbacks", "data", "denoisers")),
        ("operators", ("guidance", "solvers", "denoisers", "exact", "verify", *ABOVE)),
        ("denoisers", ("guidance", "solvers", "exact", "verify", "data", *ABOVE)),
        ("guidance", ("exact", "verify", "data", *ABOVE)),
        ("solvers", ("exact", "verify", "data", *ABOVE)),
        ("information", ("exact", "verify", "data", *ABOVE)),
        ("exact", ("guidance", "solvers", "verify", "data", *ABOVE)),
        ("data", ABOVE),
        ("predict", ("table", "report")),
        ("callbacks", ("table", "report", "cli")),
        ("table", ("cli",)),
    ],
)
def test_arrows_run_one_way(room, never):
    wrong = [
        (name, imported)
        for name, imports in IMPORTS.items()
        if _room(name) == room
        for imported in imports
        if imported.startswith(PACKAGE) and _room(imported) in never
    ]
    assert not wrong


def test_the_module_knows_no_callback():
    """The command line lists callbacks for its help; nothing else of predict/ knows any."""
    knowing = {
        name
        for name, imports in IMPORTS.items()
        if _room(name) == "predict"
        and any(_room(i) == "callbacks" for i in imports if i.startswith(PACKAGE))
    }
    assert knowing <= {f"{PACKAGE}.predict.options"}


def test_no_circle_of_imports():
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for imported in sorted(IMPORTS[name] & FILES.keys()):
            if not FILES[imported].name.startswith("__init__"):
                walk(imported, (*path, name))
        done.add(name)

    for name in FILES:
        walk(name, ())


def test_every_public_method_has_a_docstring_or_overrides_one_that_has():
    without = []
    for name in FILES:
        try:
            members = vars(importlib.import_module(name)).values()
        except ImportError:  # an extra is not installed
            continue
        own = [c for c in members if inspect.isclass(c) and c.__module__ == name]
        routines = [getattr(c, m, None) for c in own if c.__name__[0] != "_" for m in vars(c)]
        named = [m for m in routines if getattr(m, "__name__", "_")[0] != "_"]
        without += [m for m in named if inspect.isroutine(m) and not inspect.getdoc(m)]
    assert not without
