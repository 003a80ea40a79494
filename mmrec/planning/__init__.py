"""``mmrec train``: from a text and a number of minutes to a trained model, by a plan that is an ordinary config."""
