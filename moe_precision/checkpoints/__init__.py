"""Checkpoint folders: opened, checked, and read one tensor at a time."""
