"""Comparison with other models, side by side on the same machine: ``mmrec bench``."""
