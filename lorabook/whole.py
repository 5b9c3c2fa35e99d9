"""One limit of diffusers, worked around: a pipeline's from_pretrained keeps silent on weights that its models did not find.

Their own from_pretrained tells it where it is asked by `output_loading_info`, and begins with random weights where it is
not: https://huggingface.co/docs/diffusers/api/models/overview#diffusers.ModelMixin.from_pretrained
"""
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

from diffusers import ModelMixin
from transformers import PreTrainedModel

_LOCK = threading.RLock()


@contextmanager
def read_whole(source: str, *, bundled: bool = False) -> Iterator[None]:
    """Check that the models which diffusers or transformers read inside the block found all their weights.

    Args:
        source: the folder or Hub id that they come from, for the sentence.
        bundled: whether its files hold exactly what its models have.
    Raises: FileNotFoundError if weights are missing from a folder, or if a bundled one's files hold others than its
        models have. Else both are a warning.
    """
    told: list[tuple[str, dict]] = []
    with _LOCK, ExitStack() as stack:
        for library in (ModelMixin, PreTrainedModel):
            stack.enter_context(_telling(library, told))
        yield
    for model, info in told:
        _check(source, bundled, model, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]))


@contextmanager
def _telling(library: type, told: list) -> Iterator[None]:
    """Let a library's from_pretrained write down what each model's files lacked, and what was left of them."""
    own = library.__dict__["from_pretrained"]

    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        model, info = own.__func__(cls, *args, output_loading_info=True, **kwargs)
        told.append((cls.__name__, info))
        return (model, info) if output_loading_info else model

    library.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        library.from_pretrained = own


def _check(source: str, bundled: bool, model: str, missing: list[str], unexpected: list[str]) -> None:
    if not missing and not unexpected:
        return
    lacks = f"lacks {len(missing)} of its weights ({missing[0]:.40} …), which would be random" if missing else ""
    rest = f"holds {len(unexpected)} without a place ({unexpected[0]:.40} …)" if unexpected else ""
    here = f"here are transformers {version('transformers')} and diffusers {version('diffusers')}"
    sentence = f"{source[-60:]} is not read whole: the file of {model} {' and '.join(filter(None, (lacks, rest)))}; {here}"
    if bundled:
        raise FileNotFoundError(f"bundled model {sentence}; fetch the repository's data/ anew")
    if missing and Path(source).is_dir():
        raise FileNotFoundError(f"model folder {sentence}; save it anew, without adapters on it")
    warnings.warn(f"model {sentence}", stacklevel=4)
