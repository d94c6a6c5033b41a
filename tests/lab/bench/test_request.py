"""The texts of the command line that say what is raced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsekern.lab.bench import request
from sparsekern.lab.bench.request import read_request

DEFAULTS: dict[str, Any] = {
    "linear": [],
    "tokens": 512,
    "conv": [],
    "stride": 1,
    "image": None,
    "model": None,
    "input": None,
    "sparsity": "0.5",
    "block": "1",
    "dtype": "float32",
    "threads": None,
    "device": "cpu",
    "peers": False,
    "seconds": 0.7,
}


def test_lists_and_sizes():
    texts = {"linear": ["8x16", "4X4"], "conv": ["3x8x5"], "image": "2x7x9", "sparsity": "0.9, 0.5", "block": "1,32x16"}
    found = read_request(**DEFAULTS | texts | {"dtype": "float32,bfloat16", "threads": "1"})
    assert found.linear == ((8, 16), (4, 4)) and found.conv == ((3, 8, 5),) and found.image == (2, 7, 9)
    assert found.sparsity == (0.5, 0.9) and found.block == ((1, 1), (32, 16))
    assert found.dtype == ("float32", "bfloat16") and found.threads == (1,) and found.device == torch.device("cpu")


def test_without_a_layer_a_usual_one_is_raced_on_the_present_threads():
    found = read_request(**DEFAULTS)
    assert found.linear == ((1024, 4096),) and found.threads == (torch.get_num_threads(),)
    assert read_request(**DEFAULTS | {"conv": ["8x8x3"]}) == replace(found, linear=(), conv=((8, 8, 3),))


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"linear": ["10"]}, "linear is '10'; it must be INxOUT such as 1024x4096"),
        ({"linear": ["10x0"]}, "linear is '10x0'; it must be INxOUT"),
        ({"tokens": 0}, "tokens is 0; it must be 1 or more"),
        ({"conv": ["3x3"]}, "conv is '3x3'; it must be INxOUTxKERNEL such as 64x128x3"),
        ({"stride": 0}, "stride is 0; it must be 1 or more"),
        ({"image": "2x2x2"}, "image is given without a convolution or recipe; add --conv, or drop it"),
        ({"image": "2x2", "conv": ["8x8x3"]}, "image is '2x2'; it must be BATCHxHEIGHTxWIDTH such as 32x32x32"),
        ({"input": "2x2"}, "input is given without a model; add --model, or drop it"),
        ({"input": "2xa", "model": "a:b"}, "input is '2xa'; it must be a shape such as 8x3x224x224"),
        ({"sparsity": "0.5,,0.9"}, "sparsity is '0.5,,0.9'; it must be a value, or several with commas between them"),
        ({"sparsity": "half"}, "sparsity is 'half'; it must be a fraction such as 0.9"),
        ({"sparsity": "90"}, r"sparsity is 90.0; it is the fraction absent .* \(did you mean 0.9"),
        ({"block": "0"}, "block is '0'; it must be sides of blocks such as 1,16,32"),
        ({"block": "1x2x3"}, "block is '1x2x3'; it must be one side, or OUTxIN such as 32x16"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of float32, bfloat16"),
        ({"threads": "3"}, "threads is '3'; it must be a number from 1 to 2, the cores that there are"),
        ({"threads": "one"}, "threads is 'one'; it must be a number from 1 to 2"),
        ({"device": "tpu"}, "device is 'tpu'; it must be cpu, cuda or cuda:<number>"),
        ({"device": "meta"}, "device is 'meta'; it must be cpu, cuda or cuda:<number>"),
        ({"device": "cuda:7"}, "device is 'cuda:7', but PyTorch sees"),
        ({"seconds": 0.0}, "seconds is 0; it must be a number above 0"),
        ({"seconds": float("inf")}, "seconds is inf; it must be a number above 0"),
    ],
)
def test_wrong_texts_end_in_one_sentence(monkeypatch, texts, said):
    monkeypatch.setattr(request, "usable_cores", lambda: 2)
    with pytest.raises(ValueError, match=said) as caught:
        read_request(**DEFAULTS | texts)
    assert "\n" not in str(caught.value)


def test_threads_are_those_of_a_cpu(monkeypatch):
    monkeypatch.setattr(request, "usable_device", torch.device)
    with pytest.raises(ValueError, match="threads is '1', but cuda is raced, which has none; drop it"):
        read_request(**DEFAULTS | {"device": "cuda", "threads": "1"})
