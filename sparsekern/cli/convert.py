"""``sparsekern convert``: a checkpoint in another form."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from sparsekern.cli.inspect import MaxGib, MaxTensors, describe_state, weights_file
from sparsekern.cli.shell import check_file, error_console, explained, say, stopped
from sparsekern.errors import InputError
from sparsekern.files.conversion import State, bsr_state, dense_state, sparse_state
from sparsekern.files.size_limits import DEFAULT, Limits
from sparsekern.files.states import merge_pruned
from sparsekern.files.weight_files import read_state, write_state
from sparsekern.lab.bench.request import sizes
from sparsekern.nn.selectors import matches_name
from sparsekern.topology import check_sparsity


class Form(str, Enum):
    """What a checkpoint can be turned into."""

    dense = "dense"
    sparse = "sparse"
    bsr = "bsr"


TORCH_NAMES = (".pt", ".pth")


def convert(
    source: Annotated[Path, typer.Argument(help="A file of weights, a checkpoint folder or a run folder.")],
    target: Annotated[Path, typer.Argument(help="The file to write: .safetensors, or .pt or .pth for torch.save.")],
    to: Annotated[Form, typer.Option(help="The form of linear layers and convolutions.")],
    sparsity: Annotated[
        float | None, typer.Option(help="To sparse: fraction of each layer's blocks to leave out, the weakest.")
    ] = None,
    keep_zeros: Annotated[
        bool, typer.Option("--keep-zeros", help="To sparse: exact, leave out only what is zero.")
    ] = False,
    block_size: Annotated[
        str | None, typer.Option(help="To sparse: side of the blocks, or OUTxIN. Default: as they are.")
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="To sparse: names, globs or re:patterns of the layers. Default: all.")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="To sparse: layers to leave, like --layers.")] = None,
    network: Annotated[str, typer.Option(help="Of a run: sparse or dense.")] = "sparse",
    seed: Annotated[int, typer.Option(help="Of a run: which seed.")] = 0,
    max_gib: MaxGib = DEFAULT.gib,
    max_tensors: MaxTensors = DEFAULT.tensors,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the target.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as one JSON object.")] = False,
) -> None:
    """Write a checkpoint with dense weights, with stored blocks, or with torch's own BSR tensors.

    To dense and to bsr, and to sparse with --keep-zeros, every value stays what it is. BSR is for linear layers, and
    its file is one of torch.save; convolutions become dense there. A dense file does not say how many groups a
    convolution has: its blocks are cut as for one.
    """
    with explained(error_console(), stopped, convert):
        _check(target, to, sparsity, keep_zeros, block_size, force)
        limits = Limits(max_gib, max_tensors)
        state = merge_pruned(read_state(weights_file(source, network, seed), limits))
        if to is Form.dense:
            new = dense_state(state, limits)
        elif to is Form.bsr:
            new = bsr_state(state, limits)
        else:
            new = _sparse(state, sparsity, block_size, layers or ["*"], ignore or [], limits)
        write_state(target, new)
        found = {"file": str(target), "file_bytes": target.stat().st_size, **describe_state(new)}
    if as_json:
        say(json.dumps(found))
    else:
        kinds = f"{len(found['layers'])} sparse layers, {len(found['tensors'])} other tensors"
        say(f"{target}: {kinds}, {found['file_bytes']:,} bytes")


def _check(
    target: Path, to: Form, sparsity: float | None, keep_zeros: bool, block_size: str | None, force: bool
) -> None:
    """Raise every error about the options before anything is read."""
    if to is not Form.sparse and (sparsity is not None or keep_zeros or block_size is not None):
        raise InputError(
            f"to is {to.value}, which takes no --sparsity, --keep-zeros or --block-size; drop them", parameter="to"
        )
    if to is Form.sparse and (sparsity is None) == (not keep_zeros):
        raise InputError("to is sparse, which needs --sparsity or --keep-zeros, and not both", parameter="to")
    if sparsity is not None:
        check_sparsity(sparsity)
    if to is Form.bsr and target.suffix not in TORCH_NAMES:
        raise InputError(
            f"target is {target}; BSR tensors need a file of torch.save: let the name end in .pt", parameter="target"
        )
    if target.suffix not in (".safetensors", *TORCH_NAMES):
        raise InputError(f"target is {target}; the name must end in .safetensors, .pt or .pth", parameter="target")
    check_file(target, "target")
    if os.path.lexists(target) and not force:
        raise InputError(f"target is {target}, which exists; choose another name, or --force", parameter="target")


def _sparse(
    state: State, sparsity: float | None, block_size: str | None, layers: list[str], ignore: list[str], limits: Limits
) -> State:
    block = None
    if block_size is not None:
        form = "a whole number of 1 or more, or OUTxIN such as 32x16"
        sides = sizes("block_size", block_size, (1, 2), form)
        block = (sides[0], sides[-1])

    def chosen(name: str) -> bool:
        return any(matches_name(one, name) for one in layers) and not any(matches_name(one, name) for one in ignore)

    return sparse_state(state, sparsity=sparsity, block=block, chosen=chosen, limits=limits)
