"""Numbers about models: what they store and compute."""

from sparsekern.analysis.account import Account, account, state_bytes, stored_parameters, training_bytes
from sparsekern.analysis.profile import LayerProfile, Profile, profile
from sparsekern.analysis.timing import race, time_layer

__all__ = [
    "Account",
    "LayerProfile",
    "Profile",
    "account",
    "profile",
    "race",
    "state_bytes",
    "stored_parameters",
    "time_layer",
    "training_bytes",
]
