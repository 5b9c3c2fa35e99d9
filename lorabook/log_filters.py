"""What the libraries below say while they load and no reader of a notebook needs.

diffusers warns of every component that an adapter has no weights for, and both libraries draw progress bars for files
that are read in a moment. What matters of it, `load_adapter` checks and reports itself.
"""

import warnings
from contextlib import contextmanager

import diffusers.utils.logging as diffusers_logging
import transformers.utils.logging as transformers_logging


@contextmanager
def quiet():
    """No bars and no warnings from diffusers and transformers inside the block."""
    bars = (
        transformers_logging.is_progress_bar_enabled(),
        diffusers_logging.is_progress_bar_enabled(),
    )
    level = diffusers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(level)
        for enabled, library in zip(bars, (transformers_logging, diffusers_logging), strict=True):
            if enabled:
                library.enable_progress_bar()
