"""Numbers about models: what they store and compute."""

from sparsekern.analysis.account import Account, account, state_bytes, stored_parameters, training_bytes
from sparsekern.analysis.timing import race, time_layer

__all__ = ["Account", "account", "race", "state_bytes", "stored_parameters", "time_layer", "training_bytes"]
