"""What every test starts from: a seed, no network, quiet libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models are tiny, and tests run side by side, one worker for each core: more threads only wait for one another. Set
# before torch is imported, and in the environment, so that it holds in the processes that tests start as well.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import transformers
from hypothesis import settings

from graphprune.passes.allocate_budget import _ALLOCATIONS
from graphprune.passes.methods import METHODS
from graphprune.passes.score.registry import _CRITERIA
from graphprune.rules.registry import _BY_NAME, _RULES

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# No deadline: the first example of a test pays for imports. Derandomised: a failure is the same on every machine.
settings.register_profile("graphprune", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("graphprune")
torch.set_num_threads(1)  # also where torch had been imported already


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """What a test registers goes with it: pages, examples and the README show how that is done, and are run."""
    with patch.dict(_CRITERIA), patch.dict(_ALLOCATIONS), patch.dict(METHODS), patch.dict(_RULES), patch.dict(_BY_NAME):
        yield
