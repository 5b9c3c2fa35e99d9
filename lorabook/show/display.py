"""How a result shows itself in a notebook."""

import base64
import html
import sys


def bundle(png: bytes, alt: str) -> tuple[dict, dict]:
    """What `_repr_mimebundle_` returns for a PNG: the data, and its content in words."""
    return {"image/png": base64.b64encode(png).decode()}, {"image/png": {"alt": alt}}


def image_tag(png: bytes, alt: str) -> str:
    """A PNG as a paragraph of HTML."""
    data = base64.b64encode(png).decode()
    return f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></p>'


def in_notebook() -> bool:
    """Whether a Jupyter kernel shows what is displayed."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel")
