"""Measurements, each with its floor beside it in the same run. Nothing here is a test."""
