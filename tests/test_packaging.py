"""Names, files and imports of the package, as a user meets them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import sparsekern

ROOT = Path(__file__).parent.parent


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], cwd=ROOT, capture_output=True, text=True)


def setup_argument(name):
    calls = [n for n in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(n, ast.Call)]
    return next(ast.literal_eval(k.value) for call in calls for k in call.keywords if k.arg == name)


def folder_of(package):
    return ROOT / package.replace("sparsekern.kernels", "kernels").replace(".", "/")


def test_setup_lists_every_folder():
    folders = [p.parent for top in ("sparsekern", "kernels") for p in (ROOT / top).rglob("__init__.py")]
    assert sorted(map(folder_of, setup_argument("packages"))) == sorted(folders)


def test_setup_lists_every_file_of_data():
    code = {".py", ".pyc", ".cpp", ".h", ".inc", ".so"}
    files = [p for top in ("sparsekern", "kernels") for p in (ROOT / top).rglob("*.*") if p.suffix not in code]
    listed = setup_argument("package_data")
    packed = [p for package, globs in listed.items() for glob in globs for p in folder_of(package).glob(glob)]
    assert sorted(packed) == sorted(files)


def test_the_version_is_said_once():
    line = next(x for x in (ROOT / "pyproject.toml").read_text().splitlines() if x.startswith("version"))
    assert line == f'version = "{sparsekern.__version__}"'


def test_kernels_have_one_name():
    assert "must" not in run("import sparsekern.kernels").stderr
    refused = run("import sys; sys.path.insert(0, '.'); import kernels")
    assert "import this package as 'sparsekern.kernels'" in refused.stderr


def test_no_stray_file_becomes_a_module():
    code = """
import importlib
for name in ("setup", "tests", "bench", "sparsekern"):
    try:
        importlib.import_module("sparsekern." + name)
    except ModuleNotFoundError:
        print("none", end=" ")
"""
    assert run(code).stdout == 4 * "none "


def test_import_needs_nothing_optional():
    """No Triton, no typer, no matplotlib ...: a finder that refuses them all."""
    code = """
import sys
REFUSED = {"triton", "typer", "rich", "matplotlib", "safetensors", "sklearn", "transformers", "lightning"}
class Refuse:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse)
import torch, sparsekern as sk
layer = sk.SparseLinear(64, 64, block_size=16, sparsity=0.5)
layer(torch.ones(2, 64)).sum().backward()
print(sk.summary(layer))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "16x16" in done.stdout
