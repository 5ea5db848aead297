"""Maintains a run on disk: verifies its files, and removes those that no commit record names."""
