"""A page in one file: markup, style, script and data, and nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from typing import Any

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}{data}{script}
</body>
</html>
"""


def document(title: str, body: str, style: str, script: str = "", data: Any = None) -> str:
    """A whole page. ``title`` and ``data`` may hold anything, ``body``, ``style`` and ``script`` are markup.

    ``style`` comes after what all pages share. ``data`` is found by the script as JSON in the element ``data``. The
    page may run this script and use this style, and load nothing: whatever else got into it would not run.
    """
    style = resource("graphprune.pages", "base.css") + style
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}"
    if script:
        policy += f"; script-src {_hash(script)}"
    return _PAGE.format(
        policy=html.escape(policy),
        title=html.escape(title),
        style=style,
        body=body,
        data="" if data is None else f'\n<script type="application/json" id="data">{_json(data)}</script>',
        script=f"\n<script>{script}</script>" if script else "",
    )


def resource(package: str, name: str) -> str:
    """A text file that is installed with a package."""
    return files(package).joinpath(name).read_text(encoding="utf-8")


def _json(data: Any) -> str:
    """JSON that no name in it can end: a script ends at ``</script``, and ``<!--`` changes where."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
