"""The native library as pip builds it: with a compiler, without one, and where it is required.

A copy of the source is built without a network. The compiler is wrapped so that it does not optimise, which takes most
of the time, and compiles no file twice with the same flags; those of the real build are read off its command line.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = Path("kernels/cpu/_sparsekern_cpu.so")
COMPILER = shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) or shutil.which("g++")
NO_COMPILER = {"CC": "/nonexistent", "CXX": "/nonexistent"}
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the library was built on Linux alone"),
    pytest.mark.skipif(not find_spec("pip") or not find_spec("setuptools"), reason="pip or setuptools is not here"),
]
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what git has, without what was built."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("kernels", "sparsekern"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    return copy


QUICK = """#!/bin/sh
echo "$*" >> {calls}
flags= before= out=
for argument in "$@"; do
  if [ "$before" = -o ]; then out=$argument; else flags="$flags $argument"; fi
  before=$argument
done
kept={kept}/$(echo "$flags" | cksum | tr -d " ")
case $flags in
  *" -c "*) [ -f "$kept" ] || {compiler} "$@" -O0 -o "$kept" || exit 1; exec cp "$kept" "$out" ;;
esac
exec {compiler} "$@"
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is compiled."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def compiler(tmp_path: Path, kept: Path) -> dict[str, str]:
    """The environment in which a quick compiler writes its arguments down, in ``calls``, and is told to be fast."""
    script = tmp_path / "quick"
    script.write_text(QUICK.format(calls=tmp_path / "calls", kept=kept, compiler=COMPILER))
    script.chmod(0o755)
    return {"CXX": str(script), "CXXFLAGS": "-march=native", "CFLAGS": "-march=native"}


ARM = shutil.which("aarch64-linux-gnu-g++")


@pytest.mark.skipif(ARM is None, reason="Debian's g++-aarch64-linux-gnu is not installed")
def test_the_library_compiles_and_links_for_arm_without_a_warning(tmp_path):
    """``make arm`` runs it there too."""
    sources = sorted(str(path) for path in (ROOT / LIBRARY).parent.glob("csrc/*.cpp"))
    flags = ["-std=c++17", "-O0", "-fPIC", "-fopenmp", "-Wall", "-Werror", "-march=armv8.2-a+bf16"]
    built = tmp_path / "arm.so"
    subprocess.run([ARM, *flags, *sources, "-shared", "-pthread", "-Wl,-z,defs", "-lgomp", "-o", built], check=True)

    assert built.read_bytes()[18:20] == b"\xb7\0"  # EM_AARCH64


ASIDE = ("--ignore-installed", "--prefix")
"""Without the first pip uninstalls the package from the environment that runs the tests."""


def pip(*arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-build-isolation", "--no-index"]
    clean = {name: value for name, value in os.environ.items() if name not in ("SPARSEKERN_REQUIRE_CPU", "PYTHONPATH")}
    return subprocess.run(command, env=clean | env, capture_output=True, text=True)


def use(package: Path) -> str:
    """Run a layer of an installed package outside the checkout; return where it is, its backend and what it says."""
    code = """
import logging, torch
logging.basicConfig(format="%(message)s")
import sparsekern as sk
layer = sk.SparseLinear(64, 64, block_size=32, sparsity=0.5)
for _ in range(2):
    layer(torch.ones(2, 64)).sum().backward()
print(sk.__file__, sk.ops.backends.resolve("auto", "linear", torch.ones(1, 64), (32, 32)))
"""
    env = {name: value for name, value in os.environ.items() if name != "SPARSEKERN_CPU"} | {"PYTHONPATH": str(package)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=package, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@needs_compiler
def test_a_wheel_holds_the_library_and_no_source_and_its_layers_run_on_it(source, compiler, tmp_path):
    (source / LIBRARY).write_bytes(b"of an editable install")
    env = compiler | {"SPARSEKERN_REQUIRE_CPU": "1"}
    done = pip("wheel", "--wheel-dir", tmp_path / "dist", source, env=env)
    assert done.returncode == 0, done.stderr
    assert (source / LIBRARY).read_bytes() == b"of an editable install"
    (wheel,) = (tmp_path / "dist").iterdir()
    assert "-py3-none-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "sparsekern/kernels/cpu/_sparsekern_cpu.so" in names
    assert not [name for name in names if "csrc" in name or name.startswith("kernels")]

    zipfile.ZipFile(wheel).extractall(tmp_path / "there")
    assert use(tmp_path / "there").split() == [str(tmp_path / "there/sparsekern/__init__.py"), "cpu"]

    lines = (tmp_path / "calls").read_text().splitlines()
    flags = {Path(name).name: line for line in lines for name in line.split() if name.endswith(".cpp")}
    baseline = {"library.cpp", "linear.cpp", "conv.cpp", "places.cpp", "generic.cpp", "neon_bf16.cpp"}
    assert set(flags) == baseline | {"avx2.cpp", "avx512.cpp", "avx512_bf16.cpp", "amx.cpp"}
    for name, line in flags.items():
        assert "fast-math" not in line and "-O3" in line and "-fopenmp" in line
        if os.uname().machine == "x86_64":
            asked = line.split()
            last = max(n for n, flag in enumerate(asked) if flag.startswith("-march="))
            assert asked[last] == "-march=x86-64" and not [f for f in asked[:last] if f.startswith("-mavx")], name
            assert ("-mavx2" in line) == (name not in baseline), name
            assert ("-mavx512f" in line) == (name in ("avx512.cpp", "avx512_bf16.cpp", "amx.cpp")), name
            assert ("-mavx512bf16" in line) == (name in ("avx512_bf16.cpp", "amx.cpp")), name
            assert ("-mamx-bf16" in line) == (name == "amx.cpp"), name


@needs_compiler
def test_a_compiler_without_newer_instructions_or_openmp_builds_the_library_without_them(source, compiler, tmp_path):
    """Clang's code does not link with GCC's OpenMP."""
    script = Path(compiler["CXX"])
    refuse = 'case "$*" in *-mamx*|*-mavx512bf16*|*-lgomp*) echo unknown option >&2; exit 1;; esac\nflags='
    script.write_text(script.read_text().replace("flags=", refuse, 1))
    done = pip("install", "--target", tmp_path / "there", source, env=compiler | {"SPARSEKERN_REQUIRE_CPU": "1"})

    assert done.returncode == 0, done.stderr
    said, where = use(tmp_path / "there").splitlines()
    assert said == "the native kernels run on one thread: they were built without GCC's OpenMP; build with CXX=g++"
    assert where.split()[-1] == "cpu"
    library = ctypes.CDLL(str(tmp_path / "there/sparsekern/kernels/cpu/_sparsekern_cpu.so"))
    assert not library.sk_use(b"amx") and not library.sk_use(b"avx512_bf16")
    assert not library.sk_openmp()
    assert library.sk_use(b"generic")


@needs_compiler
def test_an_editable_install_puts_the_library_beside_the_source_and_the_source_distribution_holds_it(
    source, compiler, tmp_path
):
    done = pip("install", *ASIDE, tmp_path / "prefix", "-e", source, env=compiler)
    assert done.returncode == 0, done.stderr
    assert (source / LIBRARY).is_file()

    command = [sys.executable, "setup.py", "-q", "sdist", "--formats", "tar"]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (archive,) = (source / "dist").iterdir()
    names = subprocess.run(["tar", "tf", archive], capture_output=True, text=True, check=True).stdout.split()
    inside = {name.partition("/")[2] for name in names if not name.endswith("/")}
    assert {f"kernels/cpu/csrc/{path.name}" for path in (ROOT / "kernels/cpu/csrc").iterdir()} <= inside
    assert not [name for name in inside if name.endswith((".so", ".o"))]


@pytest.mark.parametrize(
    ("what", "masks"), [("sdist --formats gztar", (0o022, 0o027)), ("bdist_wheel", (0o022, 0o077))]
)
def test_what_is_distributed_is_the_same_whenever_and_by_whomever_it_is_made(source, what, masks):
    made = []
    env = os.environ | NO_COMPILER | {"SPARSEKERN_REQUIRE_CPU": "0", "SOURCE_DATE_EPOCH": "1700000000"}
    for time, mask in zip((10**9, 1.5 * 10**9), masks, strict=True):
        for path in source.rglob("*"):
            if what == "bdist_wheel":
                path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
            os.utime(path, (time, time))
        command = [sys.executable, "setup.py", "-q", *what.split()]
        subprocess.run(command, cwd=source, env=env, check=True, capture_output=True, umask=mask)
        (archive,) = (source / "dist").iterdir()
        made.append(archive.read_bytes())
        if what != "bdist_wheel":
            with tarfile.open(archive) as opened:
                members = opened.getmembers()
            assert {(member.mtime, member.uid, member.uname) for member in members} == {(1700000000, 0, "")}
            assert f"{members[0].name}/kernels/cpu/csrc/api.h" in {member.name for member in members}
        for name in ("dist", "build", "sparsekern.egg-info"):
            shutil.rmtree(source / name, ignore_errors=True)
    assert made[0] == made[1]


def test_an_editable_install_without_a_compiler_leaves_no_older_library(source, tmp_path):
    """It might not fit the source any more."""
    (source / LIBRARY).write_bytes(b"old")
    done = pip("install", *ASIDE, tmp_path / "prefix", "-e", source, env=NO_COMPILER)

    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_without_a_compiler_the_package_runs_and_says_once_why_it_is_slower(source, tmp_path):
    done = pip("install", "--target", tmp_path / "there", source, env=NO_COMPILER)

    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))
    said, where = use(tmp_path / "there").splitlines()
    assert said == (
        "the slower backend runs linear, because 'cpu' cannot: the native library was not built "
        "(no C++ compiler at installation?); install one and run: pip install -e ."
    )
    assert where.split() == [str(tmp_path / "there/sparsekern/__init__.py"), "eager"]


def test_where_the_library_is_required_no_compiler_is_an_error(source, tmp_path):
    done = pip("wheel", "--wheel-dir", tmp_path / "dist", source, env=NO_COMPILER | {"SPARSEKERN_REQUIRE_CPU": "1"})

    assert done.returncode != 0
    assert "/nonexistent" in done.stderr
