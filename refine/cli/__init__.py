"""Command lines. Nothing here imports torch before the options are known to be valid."""
