"""The entry point of the command ``sparsekern``."""

from __future__ import annotations

import signal
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

NEEDED = {
    "typer": "typer",
    "rich": "rich",
    "numpy": "numpy",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "pydantic": "pydantic",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
}
"""What the commands import, and the name under which it is installed."""


def main() -> None:
    """Run the command line. Without the packages of the extra ``demo`` say so, and exit with 2."""
    absent = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if absent:
        print(
            f"error: sparsekern's command line needs {', '.join(absent)}; run: pip install 'sparsekern[demo]'",
            file=sys.stderr,
        )
        sys.exit(2)
    import torch

    from sparsekern import keep_freed_memory

    # AdamW's moments of weights that get no gradient sink below 1e-38 after some 600 steps. Arithmetic on such numbers
    # is so slow on a CPU that a dense step takes twice as long, which would flatter the sparse network.
    torch.set_flush_denormal(True)
    keep_freed_memory()  # as any training loop should: both networks train faster
    command = application()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # until here Ctrl-C ended the process: sparsekern/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command(prog_name="sparsekern")


def application() -> typer.Typer:
    """Return the command with its sub-commands."""
    import typer  # here, so that main() can say what is missing

    import sparsekern
    from sparsekern.cli.bench import bench
    from sparsekern.cli.compare import compare_methods
    from sparsekern.cli.convert import convert
    from sparsekern.cli.info import info
    from sparsekern.cli.inspect import inspect
    from sparsekern.cli.plan import plan
    from sparsekern.cli.report import report
    from sparsekern.cli.shell import PlainErrors
    from sparsekern.cli.train import train

    app = typer.Typer(cls=PlainErrors, add_completion=False, pretty_exceptions_enable=False)

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"sparsekern {sparsekern.__version__}")
            raise typer.Exit

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Print the version."
        ),
    ) -> None:
        """Block-sparse layers for PyTorch that train truly sparse."""

    app.command()(train)
    app.command("compare")(compare_methods)
    app.command()(report)
    app.command()(plan)
    app.command()(bench)
    app.command()(info)
    app.command()(inspect)
    app.command()(convert)
    return app


if __name__ == "__main__":
    main()
