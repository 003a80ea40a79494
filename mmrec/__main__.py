"""``python -m mmrec`` is the command ``mmrec``."""

from mmrec.cli import run

if __name__ == "__main__":
    run()
