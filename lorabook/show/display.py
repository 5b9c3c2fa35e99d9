"""A picture as notebooks take it: a PNG with what it shows in words, for those who do not see it."""

import base64
import html


def bundle(png: bytes, alt: str) -> tuple[dict, dict]:
    """What `_repr_mimebundle_` returns for a PNG: the data, and the metadata that holds the alternative text."""
    return {"image/png": base64.b64encode(png).decode()}, {"image/png": {"alt": alt}}


def image_tag(png: bytes, alt: str) -> str:
    """A PNG as a paragraph of HTML."""
    return f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'
