"""Compiled ops: found, built once, kept and loaded."""
