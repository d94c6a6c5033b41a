"""Other people's libraries: models, trainers and loggers that sparse layers and methods work in.

Each module imports its library when it is imported itself; nothing here does.
"""

from sparsekern.nn import register_host

register_host("transformers", "sparsekern.integrations.transformers")
