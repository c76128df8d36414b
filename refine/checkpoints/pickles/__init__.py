"""Pickles read without running them: the machine and its inert values."""
