"""Captions are found where people and programs put them; what is left out is named."""

import json

import datasets
import pandas
import pytest

import lorabook as lb

ROWS = [{"file_name": "a.png", "text": "A"}, {"file_name": "b.png", "text": "B"}]
LINES = "\n".join(map(json.dumps, ROWS))


@pytest.fixture
def folder(tmp_path, picture):
    """Two pictures, a.png and b.png."""
    for name in "ab":
        picture().save(tmp_path / f"{name}.png")
    return tmp_path


def moved(folder, part):
    """The pictures in a folder below."""
    (folder / part).mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).rename(folder / part / name)
    return folder / part


def captions(folder, **kwargs):
    return list(lb.load_captioned_images(folder, **kwargs)["text"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata1000.jsonl", LINES),
        ("captions.jsonl", LINES.replace("file_name", "image").replace("text", "caption")),
        ("metadata.json", json.dumps(ROWS)),
        ("data.json", LINES),
        ("metadata.json", '{"a.png": "A", "b.png": "B"}'),
        ("captions.csv", "file_name,text\na.png,A\nb.png,B\n"),
        ("words.csv", "\ufeffFile Path;Prompt\na.png;A\nb.png;B\n"),
        ("captions.tsv", "path\tcaption\nb.png\tB\na.png\tA\n"),
        (
            "meta_cap.json",
            '{"/home/me/a.png": {"caption": "A"}, "b": {"caption": "B", "resolution": [8, 8]}}',
        ),
    ],
)
def test_a_list_that_names_the_pictures_is_read(folder, silent, name, content):
    (folder / name).write_text(content)
    assert sorted(captions(folder)) == ["A", "B"]


@pytest.mark.parametrize("name", ["metadata.parquet", "captions.parquet"])
def test_a_parquet_of_names_is_a_list_and_no_data_set(folder, silent, name):
    pandas.DataFrame(ROWS).to_parquet(folder / name)
    assert captions(folder) == ["A", "B"]


def test_sd_scripts_tags_follow_the_caption(folder):
    (folder / "meta_cap.json").write_text(
        '{"a": {"caption": "A", "tags": "x, y"}, "b": {"tags": "z"}}'
    )
    assert captions(folder) == ["A, x, y", "z"]


def test_metadata_in_folders_below_is_what_datasets_reads(folder, silent):
    (moved(folder, "one") / "metadata.jsonl").write_text(LINES)
    read = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=str(folder / ".cache")
    )
    assert captions(folder) == list(read["text"]) == ["A", "B"]


@pytest.mark.parametrize(
    "names", [("a.caption", "b.caption"), ("a.TXT", "b.Caption"), ("a.png.txt", "b.txt")]
)
def test_a_text_beside_each_picture_is_read(folder, silent, names):
    for name, text in zip(names, "AB", strict=True):
        (folder / name).write_text(f"{text}\n")
    assert captions(folder) == ["A", "B"]


def test_json_beside_each_picture_is_read(folder, silent):
    for name in "ab":
        (folder / f"{name}.json").write_text(json.dumps({"width": 8, "caption": name.upper()}))
    assert captions(folder) == ["A", "B"]


def test_captions_in_the_folder_above_are_for_its_train_part(folder, silent):
    moved(folder, "train")
    (folder / "captions.csv").write_text("image,text\ntrain/a.png,A\ntrain/b.png,B\n")
    assert captions(folder) == ["A", "B"]


def test_of_two_captions_the_warning_says_which_is_taken(folder):
    (folder / "metadata.jsonl").write_text(LINES)
    (folder / "captions.csv").write_text("file_name,text\na.png,other\nb.png,B\n")
    with pytest.warns(
        UserWarning,
        match="1 image.* that of metadata.jsonl is taken, not that of captions.csv: a.png",
    ):
        assert captions(folder) == ["A", "B"]


def test_a_txt_goes_before_a_caption_file(folder):
    for ending, text in (("txt", "A"), ("caption", "other")):
        for name in "ab":
            (folder / f"{name}.{ending}").write_text(text)
    with pytest.warns(
        UserWarning,
        match="the .txt beside it is taken, not that of the .caption beside it: a.png, b.png",
    ):
        assert captions(folder) == ["A", "A"]


def test_pictures_that_metadata_does_not_list_are_left_out_by_name(folder):
    (folder / "metadata.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.warns(UserWarning, match="not listed in metadata.jsonl and are left out: b.png"):
        assert captions(folder) == ["A"]


@pytest.mark.filterwarnings("ignore:.*no caption")
def test_a_list_that_names_missing_files_says_so(folder):
    (folder / "captions.csv").write_text("file_name,text\na.png,A\ngone.png,B\n")
    with pytest.warns(UserWarning, match="captions.csv names 1 file.* not there: gone.png"):
        assert captions(folder) == ["A", ""]


def test_pictures_without_a_caption_are_named_also_where_the_text_is_empty(folder):
    (folder / "a.txt").write_text("A")
    (folder / "b.txt").write_text(" \n")
    with pytest.warns(UserWarning, match="1 of 2 images.*no caption.*: b.png"):
        assert captions(folder, allow_empty_captions=False) == ["A", ""]


def test_where_no_picture_has_a_caption_the_files_that_look_like_captions_are_named(folder):
    (folder / "words.csv").write_text("nr,words\n1,x\n")
    (folder / "c.txt").write_text("x")
    (folder / "book.xlsx").write_text("x")
    (folder / "README.md").write_text("x")
    named = r"none of the 2 images.*words.csv \(has no column file_name.*book.xlsx, c.txt$"
    with pytest.raises(ValueError, match=named) as error:
        captions(folder, allow_empty_captions=False)
    assert len(str(error.value)) <= 400


def test_empty_captions_can_be_meant(folder, silent):
    assert captions(folder, allow_empty_captions=True) == ["", ""]
