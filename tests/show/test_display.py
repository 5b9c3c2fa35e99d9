import base64

from lorabook.show.display import bundle, image_tag


def test_a_bundle_holds_the_picture_and_its_words():
    data, metadata = bundle(b"png", "a cat")
    assert base64.b64decode(data["image/png"]) == b"png" and metadata == {
        "image/png": {"alt": "a cat"}
    }


def test_words_cannot_break_out_of_a_tag():
    tag = image_tag(b"png", '"><script>')
    assert "<script>" not in tag and tag.startswith(
        '<p><img alt="&quot;&gt;&lt;script&gt;" src="data:image/png;base64,'
    )
