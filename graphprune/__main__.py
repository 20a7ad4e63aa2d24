"""``python -m graphprune``, which ``accelerate launch -m graphprune`` runs."""

import sys

from graphprune.cli import main

sys.exit(main())
