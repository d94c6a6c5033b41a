"""Numbers about models: what they store and compute."""

from sparsekern.analysis.account import Account, account, state_bytes, stored_parameters, training_bytes

__all__ = ["Account", "account", "state_bytes", "stored_parameters", "training_bytes"]
