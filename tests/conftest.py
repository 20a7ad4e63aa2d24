"""What every test starts from: a seed, no network, quiet libraries."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from hypothesis import settings

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# No deadline: the first example of a test pays for imports. Derandomised: a failure is the same on every machine.
settings.register_profile("graphprune", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("graphprune")
torch.set_num_threads(1)  # the models are tiny, and tests run side by side


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
