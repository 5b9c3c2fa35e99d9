"""Any image as 8-bit RGB: upright, in sRGB, without transparency; and as a Dataset stores it."""

import io
import os
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

# What a Pillow without plugins may not open counts as an image too, so that it is named.
_UNREADABLE = ".heic .heif .avif .jxl .jxr .svg .exr .hdr .xcf .kra"
_RAW = ".raw .dng .cr2 .cr3 .nef .arw .raf .orf .rw2 .pef .srw"
ENDINGS = {*Image.registered_extensions(), *_UNREADABLE.split(), *_RAW.split()}
ENDINGS -= {".pdf", ".mpg", ".mpeg"}
_TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")
# By a profile's colour space: the modes that it serves, and the one to convert from. A profile for
# RGB serves grey images too: scanners write such.
_MODES = {
    "RGB": (("L", "RGB"), "RGB"),
    "GRAY": (("L",), "L"),
    "CMYK": (("CMYK",), "CMYK"),
    "Lab": (("LAB",), "LAB"),
}


def plain_rgb(image: Image.Image) -> Image.Image:
    """The image upright, as 8-bit sRGB on white; a colour profile that is no use is passed over."""
    profile, image = image.info.get("icc_profile"), ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
    alpha = None
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        colours, rgba = _colours(image), image.convert("RGBA")
        alpha = rgba.getchannel("A")
        image = rgba.convert("RGB").convert("L" if colours == "L" else "RGB")
    if image.mode == "LAB":
        profile = profile or ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    conversion = _conversion(profile, _colours(image))[0] if profile else None
    if conversion is None:
        image = image.convert("RGB")
    else:
        image = ImageCms.applyTransform(image.convert(conversion.input_mode), conversion)
    image.info.pop("icc_profile", None)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image


def stored(image) -> tuple[dict, str]:
    """What a Dataset stores of an image: its file or content where that is plain RGB, else a PNG.

    An image is PIL's, a file's path, its content, a dictionary with `path` or `bytes`, or numbers.
    Beside it stands a word on a colour profile that cannot be used, or "".
    """
    if isinstance(image, str | os.PathLike):
        image = {"path": os.path.expanduser(image)}
    elif isinstance(image, bytes):
        image = {"bytes": image}
    if not isinstance(image, Mapping):
        image = image if isinstance(image, Image.Image) else _from_numbers(image)
        return _png(image), _profile(image)[1]
    path, content = image.get("path"), image.get("bytes")
    with Image.open(path or "no image" if content is None else io.BytesIO(content)) as opened:
        opened.load()
        conversion, problem = _profile(opened)
        upright = opened.getexif().get(ExifTags.Base.Orientation, 1) == 1
        opaque = opened.mode == "RGB" and "transparency" not in opened.info
        if not (upright and opaque) or conversion:
            return _png(opened), problem
    return {"path": None if content else os.path.abspath(path), "bytes": content}, problem


def _png(image: Image.Image) -> dict:
    content = io.BytesIO()
    plain_rgb(image).save(content, "PNG")
    return {"path": None, "bytes": content.getvalue()}


def _colours(image: Image.Image) -> str:
    """The mode of an image's colours alone."""
    if image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I"):
        return "L"
    return image.mode if image.mode in ("CMYK", "LAB") else "RGB"


def _profile(image: Image.Image) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """The way from an image's colours to sRGB, None where there is nothing to do, and a problem."""
    profile = image.info.get("icc_profile")
    return _conversion(profile, _colours(image)) if profile else (None, "")


@lru_cache(maxsize=32)
def _conversion(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        modes, origin = _MODES.get(space, ((), None))
        if mode not in modes:
            return None, f"its colour profile is for {space}, not for {mode}"
        conversion = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), origin, "RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
        return None, f"its colour profile cannot be read: {str(error)[:60]}"
    if origin == "RGB" and _changes_nothing(conversion):
        return None, ""
    return conversion, ""


def _changes_nothing(conversion: ImageCms.ImageCmsTransform) -> bool:
    """Whether RGB stays what it is, to two of 255, as with the sRGB profiles of cameras."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)
    converted = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), conversion))
    return np.abs(converted.astype(int) - colours).max() <= 2


def _eight_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    sixteen = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PPM", "PNG")
    top = 65535 if sixteen or values.max() > 255 else 255
    if image.mode == "F" and values.max() <= 1:
        top = 1
    return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))


def _from_numbers(values) -> Image.Image:
    """Numbers of (height, width), with channels first or last, whole or from 0 to 1."""
    values = np.asarray(values)
    if values.ndim == 3 and values.shape[-1] not in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or values.dtype.kind not in "fiu":
        raise ValueError(f"not a picture: {values.dtype} of shape {values.shape}")
    top = 1 if values.dtype.kind == "f" else 255
    if values.min() < 0 or values.max() > top:
        raise ValueError(f"numbers from {values.min():.4g} to {values.max():.4g}; give 0 to {top}")
    values = (values * (255 / top)).round().astype(np.uint8)
    return Image.fromarray(values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values)
