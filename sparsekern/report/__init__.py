"""Tables and pictures. Only draws: the numbers come from the layers below."""

from sparsekern.report.summary import Summary, summary

__all__ = ["Summary", "summary"]
