"""Check every link within a built site: `python docs/links.py build/site`.

Where myst does not know what a link is to, it leaves a span without a link.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What Sphinx and the theme write by themselves.
OWN = {"search.html", "genindex.html"}


class Page(HTMLParser):
    """What a page links to, and the names that it can be linked by."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.unresolved: list[str] = []
        self.is_in_a_link = self.is_in_a_span = False
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "a":
            self.is_in_a_link = "href" in given
        if given.get("class") == "xref myst" and not self.is_in_a_link:
            self.is_in_a_span = True
        self.names |= {name for name in (given.get("id"), given.get("name")) if name}
        for one in ("href", "src"):
            if given.get(one) and tag in ("a", "img", "script", "link", "object"):
                self.links.append(str(given[one]))

    def handle_endtag(self, tag: str) -> None:
        if tag == "a":
            self.is_in_a_link = False

    def handle_data(self, data: str) -> None:
        if self.is_in_a_span:
            self.unresolved.append(data)
            self.is_in_a_span = False


def broken(site: Path) -> list[str]:
    """Return the links that lead nowhere, each with the page that it is on."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        found += [f"{name}: {text!r} is linked to nothing known" for text in page.unresolved]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment) if target.name not in OWN else ""
            if not target.exists() or (anchor and anchor not in pages[target].names):
                found.append(f"{name}: {link}")
    return found


if __name__ == "__main__":
    (site,) = map(Path, sys.argv[1:])
    wrong = broken(site)
    print("\n".join(wrong) or f"all links within {site} lead somewhere")
    sys.exit(bool(wrong))
