"""A page that holds anything and runs nothing but its own script."""

from __future__ import annotations

import base64
import hashlib
import json
import re

from graphprune.pages.document import document, resource


def test_data_and_title_may_hold_anything() -> None:
    awkward = "</script><!--<script>\u2028 & \" '"
    page = document(awkward, "<p>body</p>", "p { margin: 0 }", "run();", {"name": awkward})
    assert json.loads(re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)[0]) == {"name": awkward}
    assert page.count("</script>") == 2
    assert "<title>&lt;/script&gt;" in page
    assert "<p>body</p>" in page


def test_only_this_style_and_script_may_be_used() -> None:
    page = document("t", "", "p { margin: 0 }", "run();")
    for kind, content in (
        ("style", resource("graphprune.pages", "base.css") + "p { margin: 0 }"),
        ("script", "run();"),
    ):
        assert f"<{kind}>{content}</{kind}>" in page
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src &#x27;sha256-{digest}&#x27;" in page
    assert "script-src" not in document("t", "", "")
