"""Bars for what takes long within a step."""

import multiprocessing
import os

from tqdm import tqdm

SHOW_AFTER = 10  # seconds


def progress(items, what, total=None):
    """`items`, with a bar below the run's own if they take longer than `SHOW_AFTER`.

    Samplers in processes of their own, and all ranks but the first, show none.
    """
    other_rank = os.environ.get("RANK", "0") != "0"
    hidden = other_rank or multiprocessing.parent_process() is not None
    return tqdm(
        items, what, total, leave=False, delay=SHOW_AFTER, disable=hidden, dynamic_ncols=True
    )
