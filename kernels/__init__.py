"""Low-level kernels: tensors in, tensors out. No autograd, no checks, no import of the rest of the package.

Each backend is a sub-package with the functions that :mod:`sparsekern.kernels.contract` describes.
"""

# The folder lies beside the package in a checkout; under its own name it would be a second copy of every class.
if __name__ != "sparsekern.kernels":
    raise ImportError(f"import this package as 'sparsekern.kernels', not as {__name__!r}", name=__name__)
