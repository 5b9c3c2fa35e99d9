import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image

import lorabook as lb


def write_metadata(folder, *rows):
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def only_image(folder):
    return lb.load_captioned_images(folder)[0]["image"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder


def test_bundled_creatures_have_images_and_texts():
    images = lb.load_captioned_images("creatures")
    assert images.column_names == ["image", "text"] and len(images) == 300
    assert images[0]["image"].size == (64, 64) and "creature" in images[0]["text"]


def test_metadata_jsonl_gives_the_captions_in_its_order(folder, picture):
    for name in "ab":
        picture().save(folder / f"{name}.png")
    write_metadata(
        folder, {"file_name": "b.png", "text": "second"}, {"file_name": "a.png", "text": "first"}
    )
    assert list(lb.load_captioned_images(folder)["text"]) == ["second", "first"]


def test_metadata_csv_with_another_caption_column(folder, picture):
    picture().save(folder / "a.png")
    (folder / "metadata.csv").write_text('file_name,caption\na.png,"one, two"\n')
    assert lb.load_captioned_images(folder)[0]["text"] == "one, two"


def test_texts_beside_the_images(folder, picture, silent):
    picture().save(folder / "a.png")
    (folder / "a.txt").write_text("a red square\n")
    assert lb.load_captioned_images(folder)[0]["text"] == "a red square"


def test_a_folder_without_captions_gives_empty_ones_and_says_so(folder, picture):
    picture().save(folder / "a.png")
    with pytest.warns(UserWarning, match="no caption.*a.png"):
        assert lb.load_captioned_images(folder)[0]["text"] == ""


def test_a_train_subfolder_is_found(folder, picture):
    (folder / "train").mkdir()
    picture().save(folder / "train/a.png")
    write_metadata(folder / "train", {"file_name": "a.png", "text": "x"})
    assert lb.load_captioned_images(folder)[0]["text"] == "x"


@pytest.mark.filterwarnings("ignore:.*no caption")
def test_what_is_no_image_is_passed_over(folder, picture):
    picture().save(folder / "a.png")
    for junk in (".ipynb_checkpoints", ".cache"):
        (folder / junk).mkdir()
        picture().save(folder / junk / "b.png")
    for name in ("Thumbs.db", "notes.md", ".hidden.png"):
        (folder / name).write_bytes(b"junk")
    assert len(lb.load_captioned_images(folder)) == 1


@pytest.mark.filterwarnings("ignore:.*no caption")
def test_an_unreadable_image_is_named(folder, picture):
    picture().save(folder / "good.png")
    whole = io.BytesIO()
    picture(size=(64, 64)).save(whole, "JPEG")
    (folder / "cut.jpg").write_bytes(whole.getvalue()[:300])
    (folder / "fake.png").write_text("not an image")
    with pytest.warns(UserWarning, match="2 image.*cut.jpg.*fake.png"):
        assert len(lb.load_captioned_images(folder)) == 1


@pytest.mark.filterwarnings("ignore:.*no caption")
def test_rotation_from_exif_is_applied(folder):
    image = Image.new("RGB", (20, 10), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folder / "a.jpg", exif=exif)
    assert only_image(folder).size == (10, 20)


@pytest.mark.filterwarnings("ignore:.*no caption")
def test_transparency_is_laid_on_white(folder):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(folder / "a.png")
    assert only_image(folder).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.filterwarnings("ignore:.*no caption")
def test_a_transparent_palette_is_laid_on_white(folder):
    Image.new("P", (4, 4), 0).save(folder / "a.gif", transparency=0)
    assert only_image(folder).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.filterwarnings("ignore:.*no caption")
@pytest.mark.parametrize(
    ("mode", "ending"), [("L", "png"), ("P", "png"), ("CMYK", "jpg"), ("1", "png"), ("LA", "png")]
)
def test_other_modes_become_rgb_of_the_same_look(folder, picture, mode, ending):
    picture("white", (8, 8), mode).save(folder / f"a.{ending}")
    image = only_image(folder)
    assert image.mode == "RGB" and min(image.getpixel((3, 3))) >= 250


@pytest.mark.filterwarnings("ignore:.*no caption")
def test_sixteen_bits_become_eight(folder):
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(folder / "a.png")
    assert only_image(folder).getpixel((0, 0)) == (128, 128, 128)


def test_a_dataset_passes_through_with_its_caption_column_found(picture):
    source = datasets.Dataset.from_dict({"image": [picture("blue")], "prompt": ["blue"], "id": [7]})
    images = lb.load_captioned_images(source)
    assert images.column_names == ["image", "text"] and images[0]["text"] == "blue"
    assert images[0]["image"].getpixel((0, 0)) == (0, 0, 255)


def test_a_folder_shaped_like_a_hub_data_set_is_read(folder, picture):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    source = datasets.Dataset.from_dict(
        {"image": [picture("blue"), picture("red")], "text": ["blue", "red"]}, features
    )
    (folder / "data").mkdir()
    source.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    images = lb.load_captioned_images(folder)
    assert list(images["text"]) == ["blue", "red"] and images[1]["image"].getpixel((0, 0)) == (
        255,
        0,
        0,
    )


@pytest.mark.filterwarnings("ignore:.*no caption")
@pytest.mark.parametrize("name", ["no/such/folder", "nowhere"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(FileNotFoundError, match=name):
        lb.load_captioned_images(name)


def test_an_empty_folder_is_an_error(folder):
    with pytest.raises(FileNotFoundError, match="has no images"):
        lb.load_captioned_images(folder)


@pytest.mark.filterwarnings("ignore:.*no caption")
def test_a_folder_with_no_readable_image_is_an_error(folder):
    (folder / "a.png").write_text("junk")
    with pytest.raises(ValueError, match="none of the 1 images.*a.png"):
        lb.load_captioned_images(folder)


def test_metadata_that_names_a_missing_file_is_an_error(folder):
    write_metadata(folder, {"file_name": "gone.png", "text": "x"})
    with pytest.raises(FileNotFoundError, match="gone.png"):
        lb.load_captioned_images(folder)


def test_no_caption_column_lists_the_columns(folder, picture):
    picture().save(folder / "a.png")
    write_metadata(folder, {"file_name": "a.png", "size": 3, "author": "x", "place": "y"})
    with pytest.raises(ValueError, match="size, author, place"):
        lb.load_captioned_images(folder)


def test_a_column_that_is_no_caption_is_not_taken_for_one(folder, picture):
    picture().save(folder / "a.png")
    (folder / "metadata.csv").write_text("file_name,width\na.png,64\n")
    with pytest.raises(ValueError, match="no caption column; its columns are: width"):
        lb.load_captioned_images(folder)


def test_a_csv_caption_with_an_unquoted_comma_is_an_error(folder, picture):
    picture().save(folder / "a.png")
    (folder / "metadata.csv").write_text("file_name,text\na.png,a red, big cat\n")
    with pytest.raises(ValueError, match="line 2 has more cells.*quote"):
        lb.load_captioned_images(folder)


@pytest.mark.filterwarnings("ignore:.*no caption")
def test_files_of_one_name_in_two_folders_keep_their_captions(folder, picture):
    for part in "ab":
        (folder / part).mkdir()
        picture().save(folder / part / "1.png")
    (folder / "a" / "1.txt").write_text("told")
    assert list(lb.load_captioned_images(folder)["text"]) == ["told", ""]


def test_a_dataset_with_damaged_and_missing_images_names_their_rows(picture):
    good = io.BytesIO()
    picture().save(good, "PNG")
    rows = [{"bytes": b"junk", "path": None}, {"bytes": good.getvalue(), "path": None}, None]
    source = datasets.Dataset.from_dict(
        {"image": rows, "text": ["a", "b", "c"]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    with pytest.warns(UserWarning, match="row 0.*row 2"):
        assert list(lb.load_captioned_images(source)["text"]) == ["b"]


def test_an_image_column_that_is_not_there_lists_the_columns(picture):
    source = datasets.Dataset.from_dict({"image": [picture()], "text": ["x"]})
    with pytest.raises(
        ValueError, match="no column of images 'imgae'; its columns are: image, text"
    ):
        lb.load_captioned_images(source, image_column="imgae")


def test_a_caption_column_that_is_not_there_lists_the_columns(folder, picture):
    picture().save(folder / "a.png")
    write_metadata(folder, {"file_name": "a.png", "text": "x"})
    with pytest.raises(ValueError, match="no column 'prompt'; its columns are: text"):
        lb.load_captioned_images(folder, caption_column="prompt")


@pytest.mark.parametrize("caption", [5, None, [1], {"a": 1}])
def test_a_caption_that_is_not_text_is_an_error(folder, picture, caption):
    picture().save(folder / "a.png")
    write_metadata(folder, {"file_name": "a.png", "text": caption})
    with pytest.raises(ValueError, match="a.png is not text"):
        lb.load_captioned_images(folder)


def test_metadata_that_is_not_json_names_the_line(folder, picture):
    picture().save(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{oops')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        lb.load_captioned_images(folder)


def test_instance_images_have_one_prompt_and_need_no_captions(folder, picture, silent):
    for name in ("b.png", "a.jpg", ".hidden.png"):
        picture().save(folder / name)
    (folder / "a.txt").write_text("a caption of its own")
    (folder / ".ipynb_checkpoints").mkdir()
    picture().save(folder / ".ipynb_checkpoints/a.png")
    images = lb.load_instance_images(folder, "a sks cat")
    assert images["text"] == ["a sks cat"] * 2 and images[0]["image"].mode == "RGB"


def test_instance_images_can_have_captions_of_their_own(folder, picture):
    picture().save(folder / "a.png")
    write_metadata(folder, {"file_name": "a.png", "caption": "red"})
    assert lb.load_instance_images(folder, "ignored", caption_column="caption")["text"] == ["red"]


def test_instance_images_come_from_a_dataset_or_a_bundled_name_too(picture):
    dataset = datasets.Dataset.from_dict({"picture": [picture()]}).cast_column(
        "picture", datasets.Image()
    )
    assert lb.load_instance_images(dataset, "x")["text"] == ["x"]
    assert len(lb.load_instance_images("subjects/striped_boat")) == 5


def test_no_folder_of_instance_images_is_an_error(folder):
    with pytest.raises(FileNotFoundError, match="has no images"):
        lb.load_instance_images(folder)
    with pytest.raises(FileNotFoundError, match="'nowhere' not found"):
        lb.load_instance_images("nowhere")
