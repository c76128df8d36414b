"""The course of a run: networks, steps, snapshots, states."""
