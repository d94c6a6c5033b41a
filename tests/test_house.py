"""The rules of the house that a machine can check: arrows, optional packages, rooms, sizes of files, errors."""

from __future__ import annotations

import ast
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LONGEST

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
    "peft",
}
MAY_IMPORT_OPTIONAL = {
    "cli": {"typer", "rich"},
    "gpu": {"triton"},
    "integrations": {"transformers", "lightning", "peft", "safetensors"},  # each module is imported for its library
}


SMALL = {
    "sparsekern/errors.py": "below all layers, for each of them raises it",
}
"""Sources of fewer than 40 lines, and why each is a file of its own."""

FEW = {
    "tests/ops/test_onnx.py": "both exporters, each on every kind of model",
    "tests/test_cpu_sanitizers.py": "one program, which is run by hand for longer",
    "tests/test_gpu_conv2d_mutations.py": "a list of mutations, each a case",
    "tests/test_gpu_mutations.py": "a list of mutations, each a case",
    "tests/test_method_mutations.py": "a list of mutations, each a case",
}
"""Test files with fewer than three tests, and why."""


def sources(root: Path) -> list[Path]:
    return sorted([*(root / "kernels").rglob("*.py"), *(root / "sparsekern").rglob("*.py")])


@functools.cache
def parse(text: str) -> ast.Module:
    return ast.parse(text)


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
        for line, module in imports(parse(path.read_text())):
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
        tree = parse(path.read_text())
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
    named = {str(room).partition("/")[0] for room in rooms}
    return [
        *(f"{room} has no folder in tests/" for room in sorted(rooms - tested)),
        *(f"tests/{room} mirrors no room" for room in sorted(tested - rooms)),
        *(f"{room} is no layer, or a layer is no room" for room in sorted(named ^ RANK.keys())),
    ]


def size_violations(root: Path) -> list[str]:
    """Sources and tests of more than 400 lines; sources that are fragments; test files that are."""
    texts = {path: path.read_text() for path in [*sources(root), *sorted((root / "tests").rglob("*.py"))]}
    lines = {str(path.relative_to(root)): len(text.splitlines()) for path, text in texts.items()}
    small = {
        path for path, count in lines.items() if count < 40 and "/__" not in path and not path.startswith("tests/")
    }
    few = {
        str(path.relative_to(root))
        for path, text in texts.items()
        if path.name[:5] == "test_" and count_tests(text) < 3
    }
    return [
        *(f"{path} has {count} lines; 400 are enough" for path, count in lines.items() if count > 400),
        *(f"{path} has {lines[path]} lines: it belongs to a neighbour" for path in sorted(small - SMALL.keys())),
        *(f"{path} has fewer than three tests: they belong to a neighbour" for path in sorted(few - FEW.keys())),
        *(f"{path} is no exception" for path in sorted({*SMALL, *FEW} - small - few) if (root / path).is_file()),
    ]


def count_tests(text: str) -> int:
    return sum(isinstance(n, ast.FunctionDef) and n.name.startswith("test_") for n in ast.walk(parse(text)))


def error_violations(root: Path) -> list[str]:
    """Return where a plain ValueError is raised: an InputError tells the command that the input was at fault."""
    return [
        f"{path.relative_to(root)}:{node.lineno} raises a plain ValueError"
        for path in sources(root)
        if path.is_relative_to(root / "sparsekern")
        for node in ast.walk(parse(path.read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) == "ValueError"
    ]


def longest_violations(root: Path) -> list[str]:
    """Files of tests that are to begin, but are gone."""
    return [
        f"conftest.py begins with {name}, which is gone" for name in LONGEST if not (root / "tests" / name).is_file()
    ]


CHECKS = (arrow_violations, optional_violations, mirror_violations, size_violations, error_violations)


@pytest.mark.parametrize("check", [*CHECKS, longest_violations])
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


def test_a_layer_that_is_no_room_is_found(copy):
    (copy / "sparsekern/transforms").rename(copy / "sparsekern/transformers")
    assert "transformers is no layer, or a layer is no room" in mirror_violations(copy)


def test_a_file_that_is_gone_is_found(tmp_path):
    assert longest_violations(tmp_path)[0] == f"conftest.py begins with {LONGEST[0]}, which is gone"


def test_fragments_and_large_files_are_found(copy):
    (copy / "sparsekern/nn/utils.py").write_text("SIDE = 1\n")
    (copy / "sparsekern/nn/all.py").write_text(401 * "SIDE = 1\n")
    (copy / "tests/nn/test_two.py").write_text("def test_a(): pass\n\n\ndef test_b(): pass\n")
    assert size_violations(copy) == [
        "sparsekern/nn/all.py has 401 lines; 400 are enough",
        "sparsekern/nn/utils.py has 1 lines: it belongs to a neighbour",
        "tests/nn/test_two.py has fewer than three tests: they belong to a neighbour",
    ]
