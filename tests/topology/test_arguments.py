import numpy
import pytest
import torch

from sparsekern.topology.arguments import check_number, check_whole


@pytest.mark.parametrize("value", [0, -3, numpy.int64(5), torch.tensor(7)])
def test_whole_numbers(value):
    check_whole("seed", value)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, torch.tensor(7.0), torch.ones(2)])
def test_no_whole_numbers(value):
    with pytest.raises(TypeError) as error:
        check_whole("seed", value)
    assert str(error.value) == f"seed is {value!r}; it must be a whole number"


@pytest.mark.parametrize("value", [0, 0.5, float("nan"), numpy.float32(1)])
def test_numbers(value):
    check_number("rate", value, "a number")


@pytest.mark.parametrize("value", ["0.5", None, 1j])
def test_no_numbers(value):
    with pytest.raises(TypeError) as error:
        check_number("rate", value, "a number above 0")
    assert str(error.value) == f"rate is {value!r}; it must be a number above 0"
