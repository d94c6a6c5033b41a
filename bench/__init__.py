"""Checks and measurements that are run by hand, ``python -m bench.<name>``. Not part of the package."""
