"""The compiler passes, one file each, named by its verb. Imported as ``graphprune.passes``."""

from graphprune.passes.base import Pass, compiler_pass, run_passes

__all__ = ["Pass", "compiler_pass", "run_passes"]
