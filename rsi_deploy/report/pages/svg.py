"""A rendered SVG made fit to stand in a page.

It gets no fixed size, ids that are the page's own, a title and a description for screen readers; what shows nothing
goes, and what a mark says of itself becomes its `<title>`, which browsers show at the pointer. Colours stay attributes,
so that the page's style can give each another value in the dark.
"""

import re
from xml.etree import ElementTree

_SVG = "{http://www.w3.org/2000/svg}"


def tidied(text: str, name: str, title: str, description: str) -> str:
    """The picture `text`, its ids beginning with `name`, with what it is called and what it shows."""
    root = ElementTree.fromstring(re.sub(r"(?<=[\"#(])(clip|gradient_?)(?=\d+[\")])", rf"{name}-\1", text))
    _prune(root)
    width, height = root.attrib.pop("width"), root.attrib.pop("height")
    root.attrib = {
        "viewBox": f"0 0 {width} {height}",
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
        "class": "picture",
    }
    for tag, content in (("desc", description), ("title", title)):
        element = ElementTree.Element(f"{_SVG}{tag}", {"id": f"{name}-{tag}"})
        element.text = content
        root.insert(0, element)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)  # inside HTML the namespace goes without saying
    return ElementTree.tostring(root, encoding="unicode")


def _prune(parent: ElementTree.Element) -> None:
    """Drop what shows nothing, and turn what a mark says of itself into its title."""
    for child in list(parent):
        classes = child.attrib.pop("class", "").split()
        if {"background", "foreground"} & set(classes) and not child.get("stroke"):
            parent.remove(child)
            continue
        said, role = child.attrib.pop("aria-label", ""), child.attrib.pop("aria-roledescription", "")
        for unused in ("role", "aria-hidden", "pointer-events", "font-family"):
            child.attrib.pop(unused, None)
        if child.get("opacity") == "1":
            del child.attrib["opacity"]
        _prune(child)
        if said and role not in ("axis", "legend", "title") and child.tag != f"{_SVG}g":
            ElementTree.SubElement(child, f"{_SVG}title").text = said
        if child.tag == f"{_SVG}g" and not len(child):
            parent.remove(child)
