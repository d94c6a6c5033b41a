"""``python -m sparsekern`` is the command ``sparsekern``."""

from sparsekern.cli.main import main

if __name__ == "__main__":
    main()
