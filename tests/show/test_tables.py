from lorabook.show.tables import as_html, as_text


def test_columns_stand_under_each_other():
    assert as_text(["a", "bb"], [["long", "1"], ["x", "22"]]) == "a     bb\nlong  1\nx     22"


def test_a_table_may_have_no_heads():
    assert as_text([], [["a", "b"]]) == "a  b" and "<th" not in as_html([], [["a", "b"]])


def test_text_is_no_html():
    assert "&lt;b&gt;" in as_html(["<b>"], [["x"]])
