"""What is recorded of a pruned model, to read: as a page, in the terminal, or as JSON."""

from __future__ import annotations

from graphprune.html_report.findings import Findings, collect
from graphprune.html_report.page import to_html
from graphprune.html_report.terminal import show

__all__ = ["Findings", "collect", "show", "to_html"]
