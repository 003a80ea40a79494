"""``python -m mmrec`` is the command ``mmrec``."""

from mmrec.cli import run

run()
