"""Runs, and the files of models."""
