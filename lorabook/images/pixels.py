"""Any picture as 8-bit RGB: upright, in sRGB, without transparency."""

import io
import os
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")
# what a Pillow without plugins may not open counts too, so that it is named as unreadable and not passed over
ENDINGS = frozenset(Image.registered_extensions()) - {".pdf", ".mpg", ".mpeg"} | {
    ".heic",
    ".heif",
    ".avif",
    ".jxl",
    ".jxr",
    ".svg",
    ".exr",
    ".hdr",
    ".xcf",
    ".kra",
    ".raw",
    ".dng",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".raf",
    ".orf",
    ".rw2",
    ".pef",
    ".srw",
}


def plain_rgb(image: Image.Image) -> Image.Image:
    """The image upright, as 8-bit sRGB, transparency laid on white; a colour profile that is no use is passed over."""
    profile, image = image.info.get("icc_profile"), ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
    alpha = None
    if image.mode in TRANSPARENT or "transparency" in image.info:
        whole, grey = image.convert("RGBA"), _base(image) == "L"
        alpha, image = whole.getchannel("A"), whole.convert("RGB").convert("L" if grey else "RGB")
    image = _in_srgb(image, profile)
    image.info.pop("icc_profile", None)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image


def stored(path: str | os.PathLike | None, content: bytes | None = None) -> tuple[dict, str]:
    """What a Dataset keeps of an image: its file as it is where that is plain RGB, else its plain RGB as PNG.

    Returns: that as path and bytes, and a word on a colour profile that cannot be used, or "".
    """
    with Image.open(io.BytesIO(content) if content is not None else path or "no image") as image:
        image.load()
        conversion, problem = profile_of(image)
        if (
            image.mode == "RGB"
            and not conversion
            and "transparency" not in image.info
            and not _turned(image)
        ):
            return {
                "path": os.path.abspath(path) if path and content is None else None,
                "bytes": content,
            }, problem
        return as_png(image), problem


def as_png(image: Image.Image) -> dict:
    """The plain RGB of an image as a Dataset keeps it."""
    encoded = io.BytesIO()
    plain_rgb(image).save(encoded, "PNG")
    return {"path": None, "bytes": encoded.getvalue()}


def profile_of(image: Image.Image) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """The way from an image's colours to sRGB, None where there is nothing to do, and a word where its profile is no use."""
    profile = image.info.get("icc_profile")
    return _conversion(profile, _base(image)) if profile else (None, "")


def _base(image: Image.Image) -> str:
    """The mode of an image's colours alone."""
    grey = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
    return "L" if grey else image.mode if image.mode in ("CMYK", "LAB") else "RGB"


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image without transparency as RGB, by its colour profile where it has one that can be used."""
    if image.mode == "LAB":
        profile = profile or ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    conversion = _conversion(profile, _base(image))[0] if profile else None
    if conversion is None:
        return image.convert("RGB")
    return ImageCms.applyTransform(image.convert(conversion.input_mode), conversion)


@lru_cache(maxsize=32)
def _conversion(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """As `profile_of`, for the colours of a mode. A profile for RGB serves grey pictures too: scanners write such."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        fitting = {"RGB": ("L", "RGB"), "GRAY": ("L",), "CMYK": ("CMYK",), "Lab": ("LAB",)}.get(
            space, ()
        )
        if mode not in fitting:
            return None, f"its colour profile is for {space}, not for {mode}"
        conversion = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), fitting[-1], "RGB"
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
        return None, f"its colour profile cannot be read: {str(error)[:60]}"
    return (None if fitting[-1] == "RGB" and _changes_nothing(conversion) else conversion), ""


def _changes_nothing(conversion: ImageCms.ImageCmsTransform) -> bool:
    """Whether RGB stays what it is, to two of 255, as with the sRGB profiles of cameras."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)
    return (
        np.abs(
            np.asarray(ImageCms.applyTransform(Image.fromarray(colours), conversion)).astype(int)
            - colours
        ).max()
        <= 2
    )


def _eight_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    deep = (
        image.mode.startswith("I;16")
        or (image.mode == "I" and image.format in ("PPM", "PNG"))
        or values.max() > 255
    )
    top = 65535 if deep else 1 if image.mode == "F" and values.max() <= 1 else 255
    return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))


def _turned(image: Image.Image) -> bool:
    return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
