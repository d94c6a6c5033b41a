"""Block-sparse layers for PyTorch that train truly sparse."""

from __future__ import annotations


def _use_kernels_beside_package() -> None:
    """In a checkout, let `sparsekern.kernels` (and nothing else) come from ../kernels."""
    from pathlib import Path

    here = Path(__file__).parent  # not resolve(): strict editable trees are made of links
    source = here.parent / "kernels"
    if (here / "kernels" / "__init__.py").is_file() or not (source / "__init__.py").is_file():
        return

    import sys
    from importlib.machinery import ModuleSpec
    from importlib.util import spec_from_file_location

    name = f"{__name__}.kernels"

    class KernelsBesidePackage:
        """Finds one module, so that a stray file in the checkout is never importable as part of the package."""

        @staticmethod
        def find_spec(fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
            if fullname != name:
                return None
            return spec_from_file_location(fullname, source / "__init__.py", submodule_search_locations=[str(source)])

    sys.meta_path.insert(0, KernelsBesidePackage)  # before an editable install's own finder


_use_kernels_beside_package()
del _use_kernels_beside_package

from sparsekern import ops, topology, transforms  # noqa: E402  the finder must be in place first
from sparsekern.kernels.cpu.memory import keep_freed_memory  # noqa: E402
from sparsekern.nn import SparseConv2d, SparseLinear, densify, load_, refresh_, save, sparse_layers, sparsify_  # noqa: E402
from sparsekern.ops import Probe, backend  # noqa: E402
from sparsekern.report import summary  # noqa: E402
from sparsekern.training import AGENT, GSE, SET, VRPGE, Method, RigL, Static, preset, recalibrate_norms  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AGENT",
    "GSE",
    "SET",
    "VRPGE",
    "Method",
    "Probe",
    "RigL",
    "SparseConv2d",
    "SparseLinear",
    "Static",
    "backend",
    "densify",
    "keep_freed_memory",
    "load_",
    "ops",
    "preset",
    "recalibrate_norms",
    "refresh_",
    "save",
    "sparse_layers",
    "sparsify_",
    "summary",
    "topology",
    "transforms",
]
