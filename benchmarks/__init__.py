"""Benchmarks, each measured against a baseline or lower bound in the same process. Nothing here is a test."""
