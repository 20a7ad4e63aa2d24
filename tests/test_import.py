"""``import graphprune`` is quiet and costs next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys

LOOK = "import json, sys, graphprune; print(json.dumps(sorted(sys.modules)))"
HEAVY = {"torch", "transformers", "peft", "accelerate", "numpy", "rich", "lm_eval", "datasets", "matplotlib"}


def test_importing_is_clean_and_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", LOOK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not HEAVY & set(json.loads(done.stdout))
