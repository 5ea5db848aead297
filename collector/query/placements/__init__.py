"""Places experts on the GPUs of a serving engine.

`eplb` computes a placement from loads, `balance` how balanced it is, `relation` gives queries the placements of labels.
"""
