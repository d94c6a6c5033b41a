"""Who takes part in a comparison: a method or a preset, with options, and its form on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparsekern.lab.config import Config
from sparsekern.lab.options import OPTIONS, Value


@dataclass(frozen=True)
class Contestant:
    """A method or a preset, with options.

    Raises:
        ValueError: there is no such method, or it does not have such an option.
    """

    method: str | None = None
    preset: str | None = None
    options: dict[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked = Config(**self.entries())
        object.__setattr__(self, "method", checked.method)
        object.__setattr__(self, "options", checked.options)

    @classmethod
    def parse(cls, text: str, *, preset: bool = False) -> Contestant:
        """Read ``NAME`` or ``NAME:option=value,option=value``, such as ``gse:distribution=grabo,subset_factor=2``.

        Args:
            text: see above; hyphens in the names of options are underscores, and an option alone is true.
            preset: whether the name is that of a preset.

        Raises:
            ValueError: as the class, or a value of another kind.
        """
        name, _, rest = text.partition(":")
        options: dict[str, Value] = {}
        for part in filter(None, rest.split(",")):
            key, given, value = part.partition("=")
            key = key.strip().replace("-", "_")
            options[key] = OPTIONS[key].parse(value.strip() if given else "true") if key in OPTIONS else value
        return cls(preset=name, options=options) if preset else cls(method=name, options=options)

    def entries(self) -> dict[str, Any]:
        """Return what it says in a :class:`Config`."""
        return {"method": self.method, "preset": self.preset, "options": dict(self.options)}

    @property
    def slug(self) -> str:
        """A name for a folder, such as ``gse-distribution-grabo``."""
        words = [self.preset or str(self.method)]
        for name, value in self.options.items():
            words += [name.replace("_", "-"), str(value).lower()]
        return "-".join(words)
