"""Captioned images, from folders, the Hub or memory, as a `datasets.Dataset` of plain RGB pictures and their text."""

from lorabook.images.load import image_files, load_captioned_images, load_instance_images  # noqa: F401
from lorabook.images.pixels import plain_rgb  # noqa: F401
