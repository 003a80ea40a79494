"""The recurrences: ``reference`` says what they are, ``chunked`` computes the same quickly."""
