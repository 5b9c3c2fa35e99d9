import pytest
from pandas import DataFrame

from lorabook.show.tables import Report, RowReport, as_html, as_text


class Sizes(RowReport):
    formats = {"file_size": "{:.1f} MB"}
    empty = "no files"
    row = "file"

    def __init__(self, **sizes):
        self.table = DataFrame({"name": list(sizes), "file_size": list(sizes.values())})


def test_columns_stand_under_each_other():
    assert as_text(["a", "bb"], [["long", "1"], ["x", "22"]]) == "a     bb\nlong  1\nx     22"


def test_a_table_may_have_no_heads():
    assert as_text([], [["a", "b"]]) == "a  b" and "<th" not in as_html([], [["a", "b"]])


def test_text_is_no_html():
    assert "&lt;b&gt;" in as_html(["<b>"], [["x"]])


def test_a_report_shows_its_table_and_a_note_as_text_and_as_html():
    report = Sizes(ink=3.21)
    report.note = "a & b"
    assert str(report) == repr(report) == "name  file size\nink   3.2 MB\na & b"
    assert "3.2 MB" in report._repr_html_() and "<p>a &amp; b</p>" in report._repr_html_()
    assert report.table.file_size.sum() == 3.21


def test_a_report_without_rows_says_so():
    assert str(Sizes()) == "no files" and Sizes()._repr_html_() == "<p>no files</p>"
    assert isinstance(Sizes(), Report) and not Sizes()


def test_rows_are_found_by_number_and_by_name():
    report = Sizes(ink=3.0, cat=1.5)
    assert report["cat"].file_size == report[1].file_size == 1.5
    assert [row.name for row in report] == ["ink", "cat"] and len(report) == 2
    with pytest.raises(KeyError, match="no file 'dog'; there are: ink, cat"):
        report["dog"]
