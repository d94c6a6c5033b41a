"""Every ValueError of the package is an InputError: that is how the command tells bad input from a defect."""

from __future__ import annotations

import ast

import pytest

import sparsekern as sk
from sparsekern.errors import InputError
from tests.test_house import ROOT, sources


def test_no_plain_value_error_is_raised():
    plain = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(ROOT)
        if path.relative_to(ROOT).parts[0] == "sparsekern"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) == "ValueError"
    ]
    assert plain == []


def test_the_parameter_is_an_attribute():
    with pytest.raises(InputError, match=r"^sparsity is 1\.5") as caught:
        sk.SparseLinear(64, 64, sparsity=1.5)
    assert caught.value.parameter == "sparsity"
    assert isinstance(caught.value, ValueError)
