"""Preparation of a rendered SVG for a page.

It removes the fixed size and elements that show nothing, makes the ids unique in the page, and adds a title and a
description for screen readers. The label of a mark becomes its `<title>`, which browsers show at the pointer. Colours
stay attributes, so that the page's style can replace them in dark mode.
"""

import re
from xml.etree import ElementTree

_SVG = "{http://www.w3.org/2000/svg}"


def tidied(text: str, name: str, title: str, description: str, *, is_wide: bool = False) -> str:
    """Return the SVG for a page.

    Args:
        text: the rendered SVG.
        name: prefix of all its ids.
        title: title for screen readers.
        description: description for screen readers.
        is_wide: whether it is for the whole width of a page on a desktop.
    """
    root = ElementTree.fromstring(re.sub(r"(?<=[\"#(])(clip|gradient_?)(?=\d+[\")])", rf"{name}-\1", text))
    _prune(root)
    width, height = root.attrib.pop("width"), root.attrib.pop("height")
    root.attrib = {
        "viewBox": f"0 0 {width} {height}",
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
        "class": "picture wide" if is_wide else "picture",
    }
    for tag, content in (("desc", description), ("title", title)):
        element = ElementTree.Element(f"{_SVG}{tag}", {"id": f"{name}-{tag}"})
        element.text = content
        root.insert(0, element)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)  # HTML needs no namespace
    return ElementTree.tostring(root, encoding="unicode")


def _prune(parent: ElementTree.Element) -> None:
    """Remove elements that show nothing, and turn the label of a mark into its title."""
    for child in list(parent):
        classes = child.attrib.pop("class", "").split()
        if {"background", "foreground"} & set(classes) and not child.get("stroke"):
            parent.remove(child)
            continue
        label, role = child.attrib.pop("aria-label", ""), child.attrib.pop("aria-roledescription", "")
        for unused in ("role", "aria-hidden", "pointer-events", "font-family"):
            child.attrib.pop(unused, None)
        if child.get("opacity") == "1":
            del child.attrib["opacity"]
        _prune(child)
        if label and role not in ("axis", "legend", "title") and child.tag != f"{_SVG}g":
            ElementTree.SubElement(child, f"{_SVG}title").text = label
        if child.tag == f"{_SVG}g" and not len(child):
            parent.remove(child)
