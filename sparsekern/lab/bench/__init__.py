"""The parts of ``sparsekern bench``: layers raced dense and sparse, on the user's machine."""
