"""The rules of the house that a machine can check: arrows, names, optional packages, a room of tests for every room."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A layer imports itself and what is left of it; layers in one group do not know each other.
GROUPS = [
    {"kernels"},
    {"topology"},
    {"ops"},
    {"nn"},
    {"files"},
    {"analysis"},
    {"training", "transforms"},
    {"integrations"},
    {"lab"},
    {"cli"},
]
RANK = {layer: rank for rank, group in enumerate(GROUPS) for layer in group}

OPTIONAL = {
    "triton",
    "jinja2",
    "matplotlib",
    "PIL",
    "numpy",
    "safetensors",
    "sklearn",
    "typer",
    "rich",
    "transformers",
    "lightning",
}
MAY_IMPORT_OPTIONAL = {"cli": {"typer", "rich"}, "gpu": {"triton"}}


def sources(root: Path) -> list[Path]:
    return sorted([*(root / "kernels").rglob("*.py"), *(root / "sparsekern").rglob("*.py")])


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "sparsekern" and len(parts) > 1 else None


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the module of every import, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the whole name of the module"
            module = node.module or ""
            if module == "sparsekern":
                yield from ((node.lineno, f"sparsekern.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def arrow_violations(root: Path) -> list[str]:
    found = []
    for path in sources(root):
        parts = path.relative_to(root).parts
        mine = "kernels" if parts[0] == "kernels" else parts[1] if len(parts) > 2 else None
        for line, module in imports(ast.parse(path.read_text())):
            where = f"{'/'.join(parts)}:{line}"
            if module.split(".")[0] == "kernels":
                found.append(f"{where} imports kernels by the name of its folder")
            other = layer_of(module)
            if mine in RANK and other in RANK and other != mine and RANK[other] >= RANK[mine]:
                found.append(f"{where}: {mine} imports {other}")
    return found


def optional_violations(root: Path) -> list[str]:
    found = []
    for path in sources(root):
        parts = path.relative_to(root).parts
        allowed = MAY_IMPORT_OPTIONAL.get(parts[1] if len(parts) > 2 else "", set())
        tree = ast.parse(path.read_text())
        inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        checking = {
            id(n)
            for branch in ast.walk(tree)
            if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
            for n in ast.walk(branch)
        }
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in inside | checking:
                for _, module in imports(ast.Module([node], [])):
                    if (top := module.split(".")[0]) in OPTIONAL - allowed:
                        found.append(f"{'/'.join(parts)}:{node.lineno} needs {top} to be imported")
    return found


def mirror_violations(root: Path) -> list[str]:
    """Rooms that have no tests, and folders of tests that mirror no room."""
    inner = (path.relative_to(root).parts for path in sources(root) if not path.name.startswith("__"))
    rooms = {Path(*(parts if parts[0] == "kernels" else parts[1:])).parent for parts in inner} - {Path()}
    tested = {p.relative_to(root / "tests").parent for p in (root / "tests").rglob("test_*.py")} - {Path()}
    return [f"{room} has no folder in tests/" for room in sorted(rooms - tested)] + [
        f"tests/{room} mirrors no room" for room in sorted(tested - rooms)
    ]


def error_violations(root: Path) -> list[str]:
    """Return where a plain ValueError is raised: an InputError tells the command that the input was at fault."""
    return [
        f"{path.relative_to(root)}:{node.lineno} raises a plain ValueError"
        for path in sources(root)
        if path.is_relative_to(root / "sparsekern")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) == "ValueError"
    ]


@pytest.mark.parametrize("check", [arrow_violations, optional_violations, mirror_violations, error_violations])
def test_the_house_is_in_order(check):
    assert check(ROOT) == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("kernels", "sparsekern", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    return tmp_path


def plant(path: Path, line: str) -> None:
    path.write_text(path.read_text().replace("from __future__ import annotations\n", f"{line}\n", 1))


def test_an_arrow_to_the_right_is_found(copy):
    plant(copy / "sparsekern/topology/grid.py", "from sparsekern.nn import SparseLinear")
    assert arrow_violations(copy) == ["sparsekern/topology/grid.py:3: topology imports nn"]


def test_a_plain_value_error_is_found(copy):
    plant(copy / "sparsekern/topology/grid.py", 'raise ValueError("no")')
    assert error_violations(copy) == ["sparsekern/topology/grid.py:3 raises a plain ValueError"]


def test_an_import_of_kernels_by_its_folder_is_found(copy):
    plant(copy / "sparsekern/ops/products.py", "from kernels import eager")
    assert [v for v in arrow_violations(copy) if "by the name of its folder" in v]


def test_an_optional_package_at_module_level_is_found(copy):
    plant(copy / "sparsekern/analysis/summary.py", "import matplotlib.pyplot as plt")
    assert optional_violations(copy) == ["sparsekern/analysis/summary.py:3 needs matplotlib to be imported"]


def test_a_room_without_tests_is_found(copy):
    (copy / "tests/topology").rename(copy / "tests/nothing")
    assert mirror_violations(copy) == ["topology has no folder in tests/", "tests/nothing mirrors no room"]
