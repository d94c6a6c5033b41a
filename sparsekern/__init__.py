"""Block-sparse layers for PyTorch that train truly sparse."""


def _use_kernels_beside_package() -> None:
    """Import `sparsekern.kernels` (and nothing else) from ../kernels in a checkout."""
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


def _let_ctrl_c_end_a_command_that_starts() -> None:
    """Give Ctrl-C the system's own effect while the command imports PyTorch; its ``main`` gives it back to Python.

    Python's would be a traceback out of the import, or nothing where that swallows a KeyboardInterrupt.
    """
    import signal
    import sys
    from pathlib import Path

    script, *_ = getattr(sys, "argv", None) or [""]
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if script == "-m" else []
    is_command = Path(script).stem == __name__ or module == [__name__]
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


_use_kernels_beside_package()
_let_ctrl_c_end_a_command_that_starts()
del _use_kernels_beside_package, _let_ctrl_c_end_a_command_that_starts

from sparsekern import integrations, ops, topology, transforms  # noqa: E402  the finder must be in place first
from sparsekern.analysis import summary  # noqa: E402
from sparsekern.files import load_, save  # noqa: E402
from sparsekern.kernels.cpu import keep_freed_memory, release_scratch  # noqa: E402
from sparsekern.nn import (  # noqa: E402
    SparseConv1d,
    SparseConv2d,
    SparseLinear,
    densify,
    densify_,
    refresh_,
    sparse_layers,
    sparsify_,
)
from sparsekern.ops import Probe, backend  # noqa: E402
from sparsekern.training import (  # noqa: E402
    AGENT,
    DSR,
    GSE,
    MEST,
    SET,
    VRPGE,
    Gradual,
    GraNet,
    Method,
    RigL,
    SRigL,
    Static,
    TopKAST,
    compact_,
    preset,
    recalibrate_norms,
)

__version__ = "0.1.0"

__all__ = [
    "AGENT",
    "DSR",
    "GSE",
    "MEST",
    "SET",
    "VRPGE",
    "GraNet",
    "Gradual",
    "Method",
    "Probe",
    "RigL",
    "SRigL",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
    "Static",
    "TopKAST",
    "backend",
    "compact_",
    "densify",
    "densify_",
    "integrations",
    "keep_freed_memory",
    "load_",
    "ops",
    "preset",
    "recalibrate_norms",
    "refresh_",
    "release_scratch",
    "save",
    "sparse_layers",
    "sparsify_",
    "summary",
    "topology",
    "transforms",
]
