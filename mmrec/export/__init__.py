"""``mmrec export``: a trained model for other programs."""
