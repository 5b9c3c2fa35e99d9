"""Captioned images from folders, the Hub or memory, as a Dataset of RGB images and text."""

from lorabook.images.caption_files import image_files  # noqa: F401
from lorabook.images.load import load_captioned_images, load_instance_images  # noqa: F401
from lorabook.images.pixels import plain_rgb  # noqa: F401
