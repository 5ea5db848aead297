"""Runs first in every Python process of a run under test; `stage` puts this folder on their PYTHONPATH.

Python looks for a module of this name at its start, so driver and workers are the unmodified collector. Where
`CHAOS_BOARD` is not set, nothing happens.
"""

import os

if "CHAOS_BOARD" in os.environ:
    from tests.chaos import seams

    seams.install()
