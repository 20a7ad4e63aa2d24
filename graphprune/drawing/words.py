"""What is said of a tensor, a group or an operator, in every picture alike."""

from __future__ import annotations

from typing import Any


def title(about: dict[str, Any]) -> str:
    """The name, and how many times where repeated blocks are folded."""
    return about["name"] + (f"  ×{about['count']}" if about["count"] > 1 else "")


def shape(about: dict[str, Any]) -> str:
    """The sizes of a tensor."""
    return " × ".join(map(str, about["shape"])) or "a number"


def size(about: dict[str, Any]) -> str:
    """The size of a group, before and after where a plan prunes it, and its kind."""
    if not about["kept"]:
        return f"size {about['size']}, {about['kind']}"
    before, after = ({pair[place] for pair in about["kept"]} for place in (1, 2))
    return f"size {_span(before)} → {_span(after)}, {kept_share(about):.0%} kept"


def kept_share(about: dict[str, Any]) -> float:
    """What a plan keeps of all structures of the groups that it prunes; groups it does not prune do not count."""
    return sum(after for _, _, after in about["kept"]) / sum(before for _, before, _ in about["kept"])


def structures(about: dict[str, Any]) -> str:
    """The removal structures of a group: how many, and how many parameters each of them has."""
    return f"{about['size']:,} structures of {_span(about['structure'])} parameters"


def reason(about: dict[str, Any]) -> str:
    """The reason without what the kind already says."""
    if about["kind"] == "pinned":
        return about["reason"].removeprefix("pinned: ")
    return about["reason"].partition(" (")[0]


def _span(numbers: Any) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
