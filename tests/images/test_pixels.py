"""Colour profiles are brought to sRGB as ImageCms does it; what Pillow cannot open is named."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

import lorabook as lb

SRGB = ImageCms.createProfile("sRGB")


def swapped() -> bytes:
    """A profile whose red and green are exchanged: sRGB's with two tags exchanged."""
    raw = bytearray(ImageCms.ImageCmsProfile(SRGB).tobytes())
    count = int.from_bytes(raw[128:132], "big")
    places = {bytes(raw[132 + 12 * i : 136 + 12 * i]): 136 + 12 * i for i in range(count)}
    red, green = places[b"rXYZ"], places[b"gXYZ"]
    raw[red : red + 8], raw[green : green + 8] = raw[green : green + 8], raw[red : red + 8]
    return bytes(raw)


def grey_of_gamma_one() -> bytes:
    """A profile of linear grey: a white point and a curve of gamma 1 behind sRGB's header."""
    white = b"XYZ \0\0\0\0" + b"".join(
        int(value * 65536).to_bytes(4, "big") for value in (0.9642, 1, 0.8249)
    )
    curve = b"curv\0\0\0\0\0\0\0\0"
    head = bytearray(ImageCms.ImageCmsProfile(SRGB).tobytes()[:128])
    head[16:20] = b"GRAY"
    table = (2).to_bytes(4, "big")
    for name, start, size in ((b"wtpt", 156, 20), (b"kTRC", 176, 12)):
        table += name + start.to_bytes(4, "big") + size.to_bytes(4, "big")
    head[0:4] = (188).to_bytes(4, "big")
    return bytes(head) + table + white + curve


def kept(tmp_path, image, ending="png", **kwargs):
    image.save(tmp_path / f"a.{ending}", **kwargs)
    return np.asarray(lb.load_instance_images(tmp_path)[0]["image"]).astype(int)


@pytest.fixture
def colours():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))


@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
def test_a_profile_is_applied_as_imagecms_applies_it(tmp_path, colours, silent, ending):
    profile = swapped()
    right = np.asarray(
        ImageCms.profileToProfile(colours, ImageCms.ImageCmsProfile(io.BytesIO(profile)), SRGB)
    ).astype(int)
    found = kept(
        tmp_path,
        colours,
        ending,
        icc_profile=profile,
        **({"lossless": True} if ending == "webp" else {}),
    )
    assert abs(found - right).max() == 0 and abs(found - np.asarray(colours)).max() > 50


def test_transparent_and_palette_pictures_have_profiles_too(tmp_path, silent):
    (tmp_path / "b").mkdir()
    red = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    red.putpixel((0, 0), (255, 0, 0, 0))
    found = kept(tmp_path, red, icc_profile=swapped())
    assert (found[0, 0] == 255).all() and found[2, 2, 1] > 200 > 100 > found[2, 2, 0]
    found = kept(
        tmp_path / "b", Image.new("RGB", (4, 4), "red").convert("P"), icc_profile=swapped()
    )
    assert found[2, 2, 1] > 200 > 100 > found[2, 2, 0]


def test_a_grey_profile_is_applied(tmp_path, silent):
    found = kept(tmp_path, Image.new("L", (4, 4), 128), icc_profile=grey_of_gamma_one())
    assert (
        abs(found - 188).max() <= 2
    )  # what sRGB's curve makes of 0.5: 1.055 * 0.5 ** (1 / 2.4) - 0.055


def test_a_picture_that_says_srgb_stays_the_file_that_it_is(tmp_path, colours, silent):
    profile = ImageCms.ImageCmsProfile(SRGB).tobytes()
    assert (kept(tmp_path, colours, icc_profile=profile) == np.asarray(colours)).all()
    stored = lb.load_instance_images(tmp_path).with_format("arrow")[0]["image"][0].as_py()
    assert stored["bytes"] is None and stored["path"] == str(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("profile", "said"),
    [(b"no profile", "cannot be read"), (grey_of_gamma_one(), "is for GRAY")],
    ids=["none", "grey"],
)  # a profile holds the second at which it was made
def test_a_picture_whose_profile_is_no_use_is_taken_as_it_is_with_a_word(
    tmp_path, colours, profile, said
):
    with pytest.warns(UserWarning, match=f"1 image.* colours as they are: a.png .*{said}"):
        assert (kept(tmp_path, colours, icc_profile=profile) == np.asarray(colours)).all()


def test_a_lab_picture_is_read(tmp_path, silent):
    colour, space = Image.new("RGB", (4, 4), (200, 60, 30)), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(colour, SRGB, space, outputMode="LAB")
    assert abs(kept(tmp_path, lab, "tif") - (200, 60, 30)).max() <= 3


@pytest.mark.parametrize("name", ["b.jxl", "b.heic", "b.svg", "b.CR2"])
def test_a_picture_that_pillow_cannot_open_is_named(tmp_path, picture, name):
    (tmp_path / name).write_bytes(b"\xff\x0a")
    with pytest.warns(UserWarning, match=f"{name} .Pillow cannot open it; save it as PNG"):
        assert kept(tmp_path, picture()).shape == (8, 8, 3)
