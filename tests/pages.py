"""A parser of pages that checks the balance of tags and collects texts and tables."""

from html.parser import HTMLParser

VOID = {"meta", "wbr", "br", "link", "img", "input", "hr", "base", "source", "embed"}


class PageReader(HTMLParser):
    """A parser that fails for a tag that is not closed or not open.

    `tags` are (name, attributes); `tables` caption -> rows of texts, the head first; `words` everything that is shown.
    """

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.tables, self.words = [], [], {}, ""
        self._rows, self._caption = [], ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"{tag}: an attribute twice"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "style":
            return
        self.words += data
        if inside == "caption":
            self._caption += data
        elif inside in ("td", "th"):
            self._rows[-1][-1] += data

    def ids(self):
        return [attrs["id"] for _, attrs in self.tags if "id" in attrs]

    def table(self, begins):
        """Return the rows of the table whose caption begins so, without its head."""
        (rows,) = [rows for caption, rows in self.tables.items() if caption.startswith(begins)]
        return rows[1:]


def assert_self_contained(text):
    """Assert that the page loads nothing and runs nothing: it refers to nothing but itself."""
    page = PageReader(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "use", "image", "foreignobject"}
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href", "action", "srcset", "data"):
                assert value.startswith("#"), (tag, name, value)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style
    assert len(set(page.ids())) == len(page.ids()), "an id twice"
    targets = [attrs["href"][1:] for _, attrs in page.tags if attrs.get("href", "").startswith("#")]
    targets += [name for _, attrs in page.tags for name in attrs.get("aria-labelledby", "").split()]
    assert set(targets) <= set(page.ids())
    return page
