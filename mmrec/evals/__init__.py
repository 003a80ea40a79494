"""``mmrec eval``: what the memory remembers, measured."""
