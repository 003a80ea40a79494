"""What every layer needs and no layer is about."""
