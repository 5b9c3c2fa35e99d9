"""How a result shows itself in a notebook, and how it is written."""

import base64
import html
import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "lorabook"  # of the text in a PNG that says how its content was made


def png_of(image: "Image", content: dict | None = None, **options) -> bytes:
    """An image as PNG, with content as JSON in its text; the options are Pillow's."""
    from PIL.PngImagePlugin import PngInfo  # here, since `doctor` shows tables where it is broken

    encoded, text = io.BytesIO(), PngInfo()
    if content is not None:
        text.add_itxt(KEY, json.dumps(content))
    image.save(encoded, "PNG", pnginfo=text, **options)
    return encoded.getvalue()


def write(path: str | os.PathLike, data: bytes) -> Path:
    """Write a file, into a folder that is made at need; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


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
