"""What the picture of a run says: its title and which numbers go where. :mod:`sparsekern.lab.report.plots` draws it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsekern.lab.config import Config
from sparsekern.lab.report.plots import BlockMap, Curves, draw_training
from sparsekern.lab.report.spectral import draw_spectral

logger = logging.getLogger("sparsekern")


def draw_or_warn(path: Path, draw: Callable[[Path], object]) -> None:
    """Draw a picture of results that are written already: what goes wrong is told, and ends nothing."""
    try:
        draw(path)
    except Exception as error:  # whatever it is, the training is done
        logger.warning("%s is not drawn (%s: %s); the results are complete", path, type(error).__name__, error)


def draw_summary(
    path: Path, results: dict[str, Any], rows: Sequence[dict[str, Any]], block_map: dict[str, Any]
) -> None:
    """Draw the curves of all seeds and the block map of the first one.

    Args:
        path: of the picture.
        results: of the run.
        rows: of ``metrics.jsonl``.
        block_map: of the largest sparse layer of seed 0: its name, ``rows``, ``cols``, ``kernel``, and the keys
            ``start``, ``end``.
    """
    config, networks = results["config"], results["networks"]
    names = {"sparse": f"{100 * config['sparsity']:.4g} % sparse", "dense": "dense twin"}
    draw_training(
        path,
        title=_title(config, results["data"]["name"], names["sparse"]),
        subtitle=_subtitle(config, networks),
        accuracy=[Curves(names[network], _curves(rows, network, "test_accuracy", 100)) for network in networks],
        loss=[Curves(names[network], _curves(rows, network, "loss", 1)) for network in networks],
        block_map=BlockMap(
            layer=f"{block_map['layer']} of seed 0",
            side=config["block_size"],
            rows=block_map["rows"],
            cols=block_map["cols"],
            kernel=block_map["kernel"],
            start=block_map["start"].tolist(),
            end=block_map["end"].tolist(),
        ),
    )


def draw_graphs(path: Path, results: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Draw the spectral measures of seed 0 over its training, if they were asked for."""
    records = [record for row in rows if row["seed"] == 0 for record in row.get("spectral", ())]
    if records:
        config = Config.from_json(results["config"])
        title = f"{results['data']['name']}: {config.network_title}, {100 * config.sparsity:.4g} % sparse"
        draw_spectral(path, f"{title} ({config.method_title}), block graphs of seed 0", records)


def _title(config: dict[str, Any], data: str, sparse: str) -> str:
    side, twin = config["block_size"], " beside its dense twin" if config["dense"] else ""
    titles = Config.from_json(config)
    network, method = titles.network_title, titles.method_title
    return f"{data}: {network}, {titles.sparse_title} {sparse} (blocks of {side} x {side}; {method}){twin}"


def _subtitle(config: dict[str, Any], networks: dict[str, Any]) -> str:
    scores = {name: 100 * network["test_accuracy"]["mean"] for name, network in networks.items()}
    accuracy = ", ".join(f"{name} {score:.1f} %" for name, score in scores.items())
    stored = " against ".join(f"{network['stored_parameters']:,}" for network in networks.values())
    return f"test accuracy after {config['epochs']} epochs: {accuracy};  stored parameters: {stored}"


def _curves(rows: Sequence[dict[str, Any]], network: str, key: str, scale: float) -> list[list[float]]:
    """Return one list a seed, one number an epoch."""
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        if row["network"] == network:
            by_seed.setdefault(row["seed"], []).append(scale * row[key])
    return list(by_seed.values())
