"""The wings of utils import one way, and hold nothing at their doors."""

import ast
from pathlib import Path

import pytest
from conftest import REPOSITORY

# Each may import from those after it.
WINGS = (
    "training/resources", "training", "scoring", "scoring/metrics", "generation", "data", "modeling", "execution",
    "launch", "config", "files", "prompting",
)  # fmt: skip
UTILS = REPOSITORY / "utils"


def find_imports(path: Path) -> set[str]:
    """The wings, or modules beside them, that a module imports from, wherever in it."""

    def find_wing(name: str) -> str:
        path = name.removeprefix("utils.").replace(".", "/")
        return max((wing for wing in WINGS if f"{path}/".startswith(f"{wing}/")), key=len)

    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found |= {find_wing(name) for name in names if name.startswith("utils.")}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import"
        assert not {"utils", "demo"} & set(names) and not any(name.startswith("demo") for name in names), path
    return found


def test_every_wing_has_its_place():
    modules = {path.relative_to(UTILS) for path in UTILS.rglob("*.py") if path.name != "__init__.py"}
    beside = {path.with_suffix("").name for path in modules if len(path.parts) == 1}
    assert {str(path.parent) for path in modules if len(path.parts) > 1} | beside == set(WINGS)
    assert len({wing.split("/")[0] for wing in WINGS}) <= 10


@pytest.mark.parametrize("wing", WINGS)
def test_imports_run_one_way(wing):
    paths = [UTILS / f"{wing}.py"] if (UTILS / f"{wing}.py").exists() else sorted((UTILS / wing).glob("*.py"))
    assert paths
    for path in paths:
        allowed = WINGS[WINGS.index(wing) :] if len(paths) > 1 else WINGS[WINGS.index(wing) + 1 :]
        assert find_imports(path) <= set(allowed), path


def test_a_door_holds_a_docstring_alone():
    for path in UTILS.rglob("__init__.py"):
        (docstring,) = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(docstring, ast.Expr) and docstring.value.value.strip(), path


def test_no_circle_between_modules():
    """Within a wing too."""
    imports = {}
    for path in UTILS.rglob("*.py"):
        module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        imports[module] = {node.module for node in tree if isinstance(node, ast.ImportFrom) and node.module}
    while leaves := [module for module, needed in imports.items() if not needed & imports.keys()]:
        for module in leaves:
            del imports[module]
    assert not imports


def test_no_test_file_imports_from_another():
    for path in (REPOSITORY / "tests").rglob("*.py"):
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        modules = {node.module or "" for node in tree if isinstance(node, ast.ImportFrom)}
        assert not any(module.startswith("test_") for module in modules), path
