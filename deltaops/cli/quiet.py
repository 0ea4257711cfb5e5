"""transformers' own progress bars and notes, off: a command shows its own."""

from __future__ import annotations


def quiet_transformers() -> None:
    """Leave transformers its errors, and nothing else."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' has no types
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers' has no types
