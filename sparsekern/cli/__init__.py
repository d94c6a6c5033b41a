"""The command line: ``sparsekern`` and its sub-commands, one file each."""
