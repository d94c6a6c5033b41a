"""The build: two source folders become one package, and C++ becomes the library of its native CPU kernels.

Metadata is in pyproject.toml. Without a compiler the installation succeeds and the package runs on its other kernels;
``SPARSEKERN_REQUIRE_CPU=1`` makes that an error, for where the library is expected. macOS was never tried: there the
library would be one without AVX.
"""

from __future__ import annotations

import gzip
import os
import platform
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import BaseError, CCompilerError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1; only `setup.py build_ext --inplace` runs with such an old one
    bdist_wheel = None

BUILD_ERRORS = (BaseError, CCompilerError)
LIBRARY = "sparsekern.kernels.cpu._sparsekern_cpu"
CSRC = Path("kernels/cpu/csrc")
X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "darwin"  # as WITH_AVX of api.h
ARM = platform.machine().lower() == "aarch64" and sys.platform == "linux"  # as WITH_NEON
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISA_FLAGS = {
    "library.cpp": [],
    "linear.cpp": [],
    "conv.cpp": [],
    "places.cpp": [],
    "generic.cpp": [],
    "avx2.cpp": AVX2,
    "avx512.cpp": AVX512,
    "avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    "amx.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "neon_bf16.cpp": ["-march=armv8.2-a+bf16"],
}
"""By file: which of them runs is chosen on the machine that runs it, so nothing is compiled for the one that builds."""
if not X86:
    ISA_FLAGS |= {name: [] for name in ("avx2.cpp", "avx512.cpp", "avx512_bf16.cpp", "amx.cpp")}
if not ARM:
    ISA_FLAGS["neon_bf16.cpp"] = []

NEWER = ("avx512_bf16.cpp", "amx.cpp", "neon_bf16.cpp")
"""Files that a compiler without their flags (before GCC 10, GCC 11, GCC 10) compiles without kernels."""

FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
FLAGS += ["-falign-functions=64"]  # else the speed of a loop (1x1, 8 tokens: 20 %) hangs on the code before it
# GCC 12 says so of its own intrinsics, pages of it; clang does not know the second.
FLAGS += ["-Wno-unknown-warning-option", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
LINK = ["-pthread", "-Wl,-z,defs"] if sys.platform == "linux" else []  # what is missing is an error now, not at import
OPENMP = ["-lgomp"] if sys.platform == "linux" else ["-fopenmp"]
"""PyTorch brings GCC's runtime. Clang's code calls another, whose threads would be a second team on the same cores: it
does not link with this one, and the library is built without threads."""

if X86:
    FLAGS += ["-march=x86-64"]  # lest a -march=native of CXXFLAGS reach the files for every machine


class BuildLibrary(build_ext):
    """Compiles each file with the flags of its instruction set into one library, which ctypes opens."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return a name without the Python version: the library does not know Python."""
        if fullname.rpartition(".")[2] == LIBRARY.rpartition(".")[2]:
            return os.path.join(*fullname.split(".")) + ".so"
        return str(super().get_ext_filename(fullname))

    def run(self) -> None:
        """Remove an older library first, so that a build that fails leaves none; then build.

        In place a library is built in ``build_lib`` and copied beside the source. A wheel leaves the one there alone:
        it is that of an editable installation.
        """
        for path in (Path(self.build_lib, self.get_ext_filename(LIBRARY)), Path(self.get_ext_fullpath(LIBRARY))):
            path.unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Build with GCC's OpenMP, or without threads where the compiler cannot."""
        try:
            self._link(ext, self._compile(ext, ["-fopenmp"]), OPENMP)
        except BUILD_ERRORS as first:
            try:
                self._link(ext, self._compile(ext, []), [])
            except BUILD_ERRORS:
                raise first from None
            self.warn("built without GCC's OpenMP: the native CPU kernels run on one thread; build with CXX=g++")

    def _compile(self, ext: Extension, openmp: list[str]) -> list[str]:
        def compile_one(source: str) -> list[str]:
            name = Path(source).name
            isa = ISA_FLAGS[name]

            def with_flags(flags: list[str]) -> list[str]:
                objects: list[str] = self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    depends=ext.depends,
                    extra_postargs=[*ext.extra_compile_args, *flags, *openmp],
                )
                return objects

            try:
                return with_flags(isa)
            except BUILD_ERRORS:
                if name not in NEWER:
                    raise
            compiled = with_flags(AVX512 if X86 else [])
            self.warn(f"{name} is built without kernels: the compiler does not know {' '.join(isa)}")
            return compiled

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # a thread waits for the compiler that it started
            return [name for names in pool.map(compile_one, ext.sources) for name in names]

    def _link(self, ext: Extension, objects: list[str], openmp: list[str]) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{target.name}.unfinished")  # half a library would crash whoever opens it
        self.compiler.link_shared_object(
            objects, str(unfinished), extra_postargs=[*LINK, *openmp], build_temp=self.build_temp, target_lang="c++"
        )
        os.replace(unfinished, target)


class SourceArchive(sdist):
    """Where ``SOURCE_DATE_EPOCH`` is set, an archive that is the same to the bit wherever and whenever it is made.

    (setuptools obeys it for wheels alone.)
    """

    def make_archive(self, base_name: str, format: str, *arguments: object, **named: object) -> str:
        """Pack ``base_dir``, the last argument or a named one, and return the file's name."""
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar":
            return str(super().make_archive(base_name, format, *arguments, **named))
        folder = Path(str(named["base_dir"] if "base_dir" in named else arguments[1]))

        def nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mtime, member.uid, member.gid, member.uname, member.gname = int(epoch), 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        target = f"{base_name}.tar.gz"
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        with (
            open(target, "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=int(epoch)) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for path in (folder, *sorted(folder.rglob("*"))):
                archive.add(path, recursive=False, filter=nobodys)
        return target


commands: dict[str, type] = {"build_ext": BuildLibrary, "sdist": SourceArchive}
if bdist_wheel is not None:

    class PlatformWheel(bdist_wheel):
        """A wheel for one platform and every Python: the library is no extension module."""

        def get_tag(self) -> tuple[str, str, str]:
            """Return the tag of the file name."""
            return "py3", "none", super().get_tag()[2]

        def write_wheelfile(self, *arguments: object, **named: object) -> None:
            """Write what is missing before all is packed; then take out what the builder's umask left in the modes."""
            super().write_wheelfile(*arguments, **named)
            for path in Path(self.bdist_dir).rglob("*"):
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)

    commands["bdist_wheel"] = PlatformWheel

setup(
    # Every package by name: a wheel lacks one that is forgotten here, a checkout does not show it.
    # tests/test_packaging.py compares this list with the folders.
    packages=[
        "sparsekern",
        "sparsekern.analysis",
        "sparsekern.analysis.plan",
        "sparsekern.cli",
        "sparsekern.files",
        "sparsekern.integrations",
        "sparsekern.integrations.transformers",
        "sparsekern.nn",
        "sparsekern.ops",
        "sparsekern.lab",
        "sparsekern.lab.bench",
        "sparsekern.lab.models",
        "sparsekern.lab.report",
        "sparsekern.topology",
        "sparsekern.training",
        "sparsekern.training.agent",
        "sparsekern.training.growth",
        "sparsekern.training.vrpge",
        "sparsekern.transforms",
        "sparsekern.kernels",
        "sparsekern.kernels.cpu",
        "sparsekern.kernels.eager",
        "sparsekern.kernels.gpu",
    ],
    package_dir={"sparsekern": "sparsekern", "sparsekern.kernels": "kernels"},
    include_package_data=False,
    package_data={
        "sparsekern": ["py.typed"],
        "sparsekern.lab.report": ["page.html"],
        "sparsekern.kernels.gpu": ["configs/*.json"],
    },
    ext_modules=[
        Extension(
            LIBRARY,
            sources=[str(CSRC / name) for name in ISA_FLAGS],
            # All of them and this file: objects in build/ are made anew when any of it changes.
            depends=["setup.py", *sorted(str(path) for path in CSRC.iterdir() if path.suffix in (".h", ".inc"))],
            language="c++",
            extra_compile_args=FLAGS,
            optional=os.environ.get("SPARSEKERN_REQUIRE_CPU") != "1",
        )
    ],
    cmdclass=commands,
)
