"""The fault campaign: many runs of a model with known answers, in which everything dies that can.

`make chaos` or `python -m tests.chaos --seed 0`; `tests/test_chaos.py` is the short form.
"""
