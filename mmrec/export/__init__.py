"""A model for other programs: ``mmrec export``."""
