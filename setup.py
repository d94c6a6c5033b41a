"""The build: two source folders become one package. Metadata is in pyproject.toml."""

from setuptools import setup

setup(
    # Every package by name: a wheel lacks one that is forgotten here, a checkout does not show it.
    # tests/test_packaging.py compares this list with the folders.
    packages=[
        "sparsekern",
        "sparsekern.analysis",
        "sparsekern.cli",
        "sparsekern.nn",
        "sparsekern.ops",
        "sparsekern.recipes",
        "sparsekern.report",
        "sparsekern.topology",
        "sparsekern.training",
        "sparsekern.kernels",
        "sparsekern.kernels.eager",
        "sparsekern.kernels.gpu",
    ],
    package_dir={"sparsekern": "sparsekern", "sparsekern.kernels": "kernels"},
    include_package_data=False,
    package_data={"sparsekern": ["py.typed"], "sparsekern.kernels.gpu": ["configs/*.json"]},
)
