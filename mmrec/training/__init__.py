"""What trains a model: all that is Lightning's."""
