"""Numbers about models: what they store and compute."""

from sparsekern.analysis.account import (
    Account,
    account,
    network_sparsity,
    state_bytes,
    stored_parameters,
    training_bytes,
)
from sparsekern.analysis.profile import LayerProfile, Profile, arguments, profile
from sparsekern.analysis.spectral import Spectral, spectral
from sparsekern.analysis.summary import Summary, summary
from sparsekern.analysis.timing import race, time_layer

__all__ = [
    "Account",
    "LayerProfile",
    "Profile",
    "Spectral",
    "Summary",
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
