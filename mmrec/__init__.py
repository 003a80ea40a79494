"""Train a recurrent-memory language model on your own text, on a laptop or on a cluster."""

__version__ = "0.1.0"
