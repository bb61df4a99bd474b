"""Checkpoints on disk: finding, reading and checking them, and writing synthetic ones."""
