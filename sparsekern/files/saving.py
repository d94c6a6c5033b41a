"""Saving the weights of a model in a file, and loading weights into dense or sparse layers."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.files.size_limits import DEFAULT, Limits
from sparsekern.files.states import (
    ORIGINAL,
    merge_pruned,
    metadata_of,
    shared_prefix,
    sparse_names,
    stored_layers,
    with_metadata,
    without_compile,
)
from sparsekern.files.weight_files import check_writable, read_state, write_state
from sparsekern.nn import BlockSparse, is_replaceable, plain_name, refuse_sharded, sparse_layers
from sparsekern.nn.converters import grid_of
from sparsekern.nn.layer_state import STORED, adapt, source_grid
from sparsekern.nn.sharded import GATHER
from sparsekern.topology import Grid, Topology, to_dense
from sparsekern.topology.arguments import check_kind

logger = logging.getLogger("sparsekern")


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the weights of a model as safetensors, or with ``torch.save`` if ``path`` ends in ``.pt`` or ``.pth``.

    The file appears complete or not at all; if several processes write it, the last one wins. A symbolic link of that
    name is replaced, not followed. The file holds the sizes of the weights, so it can be converted (``sparsekern
    convert``) and loaded without the code of the model. The prefixes that DDP and ``torch.compile`` add to names are
    removed.

    Args:
        model: the model.
        path: the file.

    Raises:
        ValueError: the file cannot be written, or the places of a layer are invalid; an older file is left unchanged.
        ModuleNotFoundError: the package safetensors is not installed.
        NotImplementedError: the values are sharded.
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    check_kind("path", path, (str, os.PathLike), "the name of a file")
    refuse_sharded(sparse_layers(model), f"save writes whole tensors; {GATHER}, or use torch.distributed.checkpoint")
    state = _renamed(model.state_dict(), lambda name: plain_name(model, name))
    check_writable(Path(path), state)
    try:
        stored_layers(state)
    except ValueError as error:
        raise InputError(
            f"{path} is not written: {error}; other code than move_ and load_ has changed row and col, such as an "
            "average over state_dict(): load an earlier state first"
        ) from None
    for layer in sparse_layers(model).values():
        _ = layer.index  # raises if other code wrote other places that happen to be valid
    write_state(Path(path), state)


def load_(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    strict: bool = True,
    assign: bool = False,
    max_gib: float = DEFAULT.gib,
    max_tensors: int = DEFAULT.tensors,
) -> nn.Module:
    """Load dense or sparse weights into the dense or sparse layers of a model, in place.

    From a sparse checkpoint a sparse layer takes the places too, for any block size, if it has enough slots; from a
    dense checkpoint it takes the blocks it has. A dense layer takes a sparse checkpoint as a dense weight. Everything
    is checked before the model is changed, and nothing in a file is executed.

    A prefix of all names, such as DDP's ``module.``, is removed if the model has the names without it; so are the
    prefixes of ``torch.compile``. A parameter split by PyTorch's pruning is multiplied by its mask.

    Args:
        model: the model, on any device; on the meta device with ``assign=True``.
        source: a file (safetensors or of ``torch.save``), the index of several files such as
            ``model.safetensors.index.json``, or a state dict.
        strict: whether names that only the model or only the source has are an error.
        assign: as in ``load_state_dict``, replace the tensors of the model instead of copying into them.
        max_gib: memory in GiB that a file may ask for. Files larger than a sixteenth of it may ask for 16 times their
            own size.
        max_tensors: number of tensors that a file may hold.

    Returns:
        The model.

    Raises:
        ValueError: the file cannot be read, or the weights do not fit the model.
        NotImplementedError: the values of the model are sharded.
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    check_kind("source", source, (str, os.PathLike, Mapping), "the name of a file, or a state dict")
    refuse_sharded(
        sparse_layers(model), "load_ writes whole tensors; load with set_model_state_dict and full_state_dict=True"
    )
    if isinstance(source, Mapping):
        where, state = "the state", source
    else:
        where, state = str(source), read_state(Path(source), Limits(max_gib, max_tensors))
    state = _in_names_of(model, state, where)
    metadata = metadata_of(state)
    fitting: dict[str, Any] = dict(state)
    problems = []
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        try:
            if isinstance(module, BlockSparse):
                adapt(module.topology, fitting, prefix, module.tie_taps, metadata.get(name))
            elif is_replaceable(module) and name in sparse_names(fitting):
                _densify(grid_of(module, None), fitting, prefix, metadata.get(name, {}))
        except InputError as error:
            problems.append(f"{name or 'the layer'}: {error}")
    _fill_tied(model, fitting)
    problems = problems or _differences(model, fitting, strict)
    if problems:
        raise InputError(f"{where} does not fit the model: {'; '.join(problems)}")
    # The layers now have the model's own grids, so the metadata of the file no longer apply to them.
    kept = {name: entry for name, entry in metadata.items() if f"{name}.values".lstrip(".") not in fitting}
    model.load_state_dict(with_metadata(fitting, kept), strict=strict, assign=assign)
    return model


def _in_names_of(model: nn.Module, state: Mapping[str, Tensor], where: str) -> Mapping[str, Tensor]:
    """Return a state dict with its entries renamed to those of the model, where prefixes or wrappers differ."""
    own = list(model.state_dict(keep_vars=True))
    if not any(key.endswith(ORIGINAL) for key in own):  # otherwise the model itself is being pruned
        state = merge_pruned(state)
    modules = {plain_name(model, name): name for name in (key.rpartition(".")[0] for key in own)}
    prefix = shared_prefix([without_compile(key) for key in state], set(modules))
    if prefix:
        logger.info("%s: all names begin with %r, which is removed", where, prefix)

    def rename(name: str) -> str:
        plain = f"{without_compile(name)}.".removeprefix(prefix).removesuffix(".")
        module, _, leaf = plain.rpartition(".")
        if plain in modules:
            return modules[plain]
        return f"{modules.get(module, module)}.{leaf}".removeprefix(".")

    return _renamed(state, rename)


def _renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> OrderedDict[str, Tensor]:
    """Return a state dict and its metadata with renamed entries.

    Raises:
        ValueError: two entries would have the same name.
    """
    renamed = OrderedDict((rename(key), tensor) for key, tensor in state.items())
    if len(renamed) < len(state):
        raise InputError("two entries of the state have the same name without torch.compile's prefix; rename one")
    return with_metadata(renamed, {rename(name): entry for name, entry in metadata_of(state).items()})


def _densify(own: Grid, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Replace the stored blocks of a layer by a dense weight for a layer with the grid ``own``, in place."""
    values, row, col = (state[prefix + part] for part in STORED)
    topology = Topology(source_grid(values, row, col, own, metadata), row, col)
    topology.validate()
    state[prefix + "weight"] = to_dense(topology, values)
    for part in STORED:
        del state[prefix + part]


def _fill_tied(model: nn.Module, state: dict[str, Any]) -> None:
    """Add the other names of tied parameters, of which Transformers writes one."""
    own = model.state_dict(keep_vars=True)
    given = {id(tensor): state[key] for key, tensor in own.items() if key in state}
    for key, tensor in own.items():
        if key not in state and id(tensor) in given:
            state[key] = given[id(tensor)]


def _differences(model: nn.Module, state: Mapping[str, Any], strict: bool) -> list[str]:
    """Return the errors that ``load_state_dict`` would raise."""
    own: dict[str, Any] = dict(model.state_dict(keep_vars=True))  # a module's extra state is anything
    problems = []
    if strict:
        for what, names in (("lacks", own.keys() - state.keys()), ("has unknown", state.keys() - own.keys())):
            if names:
                shown = sorted(names)
                more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
                problems.append(f"it {what} {', '.join(shown[:5])}{more}")
    for key in sorted(own.keys() & state.keys()):
        mine, theirs = own[key], state[key]
        if isinstance(mine, Tensor) and not isinstance(theirs, Tensor):
            problems.append(f"{key} is a {type(theirs).__name__}, in the model a tensor")
        elif isinstance(mine, Tensor) and mine.shape != theirs.shape:
            problems.append(f"{key} has shape {tuple(theirs.shape)}, in the model {tuple(mine.shape)}")
    return problems
