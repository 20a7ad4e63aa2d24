"""Prune a checkpoint that is larger than memory: planned on the meta device, then read, sliced, written by pieces."""
