"""Run the tests of the native CPU kernels on ARM, emulated on another processor.

    python -m tests.soak.arm [--folder build/arm] [arguments of pytest]

Without arguments, ``tests/kernels/cpu`` and ``tests/test_cpu_precision.py`` run, for an hour or more. Needs the Debian
packages g++-aarch64-linux-gnu and qemu-user-static, and apt and pip with their registries; no rights of root. The
folder keeps what was downloaded:

* ``root``: Debian's Python and the libraries it loads, for arm64. apt keeps its lists in the folder, so that the
  system's own packages stay as they are.
* ``venv``: a ``bin/python`` that starts this Python under qemu, with PyTorch and pytest. The wheels of PyTorch 2.11 and
  newer for this platform need CUDA's libraries, so it is the last one before.
* ``source``: a copy of this checkout, whose library is built by ``setup.py`` with the cross compiler (or ``CXX``).
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "qemu-aarch64-static": "qemu-user-static",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
}
DEBIAN = ("python3", "libgomp1", "libstdc++6")
WHEELS = (
    *("torch==2.10.0", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "numpy", "sympy"),
    *("typing-extensions", "pytest", "iniconfig", "packaging", "pluggy", "pygments", "setuptools"),
)
"""With all that they need: pip would decide by the processor that it runs on what that is."""

PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
TESTS = ("tests/kernels/cpu", "tests/test_cpu_precision.py")


def run(*command: object, **given: object) -> None:
    """Run a program; its failure ends this one."""
    subprocess.run([str(part) for part in command], check=True, **given)  # type: ignore[call-overload]


def unpack_debian(folder: Path) -> str:
    """Unpack Debian's Python for arm64 into ``folder/root`` and return its version, such as ``3.11``."""
    root, state = folder / "root", folder / "apt"
    if not root.exists():
        for path in ("lists/partial", "archives/partial"):
            (state / path).mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        settings = {
            "Dir::State": state,
            "Dir::State::status": state / "status",
            "Dir::Cache": state,
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
        }
        apt = ["apt-get", "-qq", *(part for name, value in settings.items() for part in ("-o", f"{name}={value}"))]
        run(*apt, "update")
        run(*apt, "install", "--download-only", "--yes", "--no-install-recommends", *DEBIAN)
        unfinished = folder / "root.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for package in sorted((state / "archives").glob("*.deb")):
            run("dpkg-deb", "-x", package, unfinished)
        unfinished.rename(root)
    return (root / "usr" / "bin" / "python3").readlink().name.removeprefix("python")


def make_environment(folder: Path, version: str) -> Path:
    """Make ``folder/venv`` and return its Python, a script that starts the one of ``folder/root`` under qemu."""
    bin_folder, python = folder / "root" / "usr" / "bin", folder / "venv" / "bin" / "python"
    packages = folder / "venv" / "lib" / f"python{version}" / "site-packages"
    if not packages.exists():
        unfinished = folder / "packages.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
        platforms = [f"--platform={platform}" for platform in PLATFORMS]
        run(*pip, f"--python-version={version}", "--implementation=cp", *platforms, "--target", unfinished, *WHEELS)
        packages.parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(packages)
    python.parent.mkdir(parents=True, exist_ok=True)
    # By the name of the script Python finds pyvenv.cfg, and tests that start sys.executable start the script.
    target = f'-L {shlex.quote(str(folder / "root"))} -0 "$0" {shlex.quote(str(bin_folder / f"python{version}"))}'
    python.write_text(f'#!/bin/sh\nexec qemu-aarch64-static -cpu max {target} "$@"\n')
    python.chmod(0o755)
    (folder / "venv" / "pyvenv.cfg").write_text(f"home = {bin_folder}\n")
    return python


def copy_source(folder: Path) -> Path:
    """Copy this checkout to ``folder/source``, laid out as if it were installed in place."""
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("kernels", "sparsekern", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "sparsekern" / "kernels").symlink_to(Path("..", "kernels"))
    return source


def main(arguments: Sequence[str]) -> int:
    """Prepare all, build, run the tests; return pytest's exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.arm", description="Tests of the CPU kernels on ARM.")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "arm")
    given, tests = parser.parse_known_args(arguments)
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if missing:
        parser.error(f"install Debian's packages {', '.join(missing)}")
    folder = given.folder.resolve()
    python = make_environment(folder, unpack_debian(folder))
    source = copy_source(folder)
    # One thread: those of OpenMP wait for each other in emulated instructions. Tests of threads start theirs.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPARSEKERN_REQUIRE_CPU": "1"}
    environment |= {"CC": "aarch64-linux-gnu-gcc", "CXX": os.environ.get("CXX", "aarch64-linux-gnu-g++")}
    run(python, "setup.py", "-q", "build_ext", "--inplace", cwd=source, env=environment)
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(tests or TESTS)]
    return subprocess.run(list(map(str, pytest)), cwd=source, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
