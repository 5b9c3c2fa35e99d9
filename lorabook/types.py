"""Types that signatures share."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias, Union

# How strongly an adapter acts: one number, the name of a preset, or a dictionary in diffusers'
# shape: component, side, block and, in a list, layer; see `live/scales.py` for what is valid where.
Scales: TypeAlias = Union[float, str, Sequence["Scales"], Mapping[str | float, "Scales"]]  # noqa: UP007
