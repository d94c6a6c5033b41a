"""Measures of models: parameters, FLOPs, bytes, milliseconds and spectral gaps."""

from sparsekern.analysis.clock import Clock, Timing, race
from sparsekern.analysis.layer_race import LayerRaces, time_layer
from sparsekern.analysis.profile import LayerProfile, Profile, arguments, profile
from sparsekern.analysis.spectral import Spectral, spectral
from sparsekern.analysis.summary import (
    Account,
    Summary,
    account,
    network_sparsity,
    state_bytes,
    stored_parameters,
    summary,
    training_bytes,
)

__all__ = [
    "Account",
    "Clock",
    "LayerProfile",
    "LayerRaces",
    "Profile",
    "Spectral",
    "Summary",
    "Timing",
    "account",
    "arguments",
    "network_sparsity",
    "profile",
    "race",
    "spectral",
    "state_bytes",
    "stored_parameters",
    "summary",
    "time_layer",
    "training_bytes",
]
