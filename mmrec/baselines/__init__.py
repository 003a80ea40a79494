"""Baselines: other models, and the training that bench and evals share; tables."""
