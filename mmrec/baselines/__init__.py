"""Other models, and what the comparisons with them share: one update, one score, tables."""
