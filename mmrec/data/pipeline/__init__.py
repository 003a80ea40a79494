"""Corpora that outgrow memory: read, cleaned and tokenized in shards, by any number of workers."""
