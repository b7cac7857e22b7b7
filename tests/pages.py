"""Reads the pages that the package writes, and refuses what is not well-formed or needs anything from elsewhere."""

import html.parser
import re


class Page(html.parser.HTMLParser):
    """Tags that stand open, texts, and what a page asks for from elsewhere."""

    EMPTY = {"meta", "br", "hr", "img", "link", "input", "path", "use"}

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.tags, self.wants = [], [], set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.wants += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read_page(source):
    """The page of a text; an AssertionError where it is no page that stands for itself."""
    page = Page()
    page.feed(source)
    page.close()
    assert not page.open
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(value.startswith("#") for value in page.wants)
    assert not re.search(r"url\((?!#)", source)
    return page
