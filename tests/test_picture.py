"""The picture on the first screen shows the stored results, and nothing else."""

import re
from xml.etree import ElementTree

from bench import picture


def test_the_stored_picture_is_that_of_the_stored_results():
    """Each point says its numbers in its title; coordinates hang on fonts, so that they are not compared."""
    stored = picture.PICTURE.read_text(encoding="utf-8")
    shown = re.findall(r"<title>([^<]*)</title>", stored)
    for point in [*picture.accuracy_points(), *picture.sweep_points()]:
        assert point.note in shown, point.note
    assert "ResNet-20: 12.34 % with 5.0 % of the parameters" not in shown


def test_it_is_made_twice_alike_and_for_both_grounds():
    text = picture.picture()
    assert text == picture.picture()
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in text
    assert "http://www.w3.org/2000/svg" in text
    assert "<script" not in text
    assert re.findall(r'(?:href|src)="', text) == []


def test_times_and_intervals_are_those_of_the_sweep():
    points = picture.sweep_points()
    assert len(points) == 13
    last = points[-1]
    assert abs(last.x - 100 / 1.32) < 1e-9
    assert last.x_low < last.x < last.x_high
    assert last.y == 98.0
