"""Every link within the README and the guides leads somewhere, sections included."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def sections(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings: lower case, no punctuation, hyphens for spaces."""
    prose = re.sub(r"(?ms)^```.*?^```", "", page.read_text())
    headings = re.findall(r"(?m)^#+ (.*)$", prose)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The page's relative links to a file that is not there, or to a section that its page does not have."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or anchor and anchor not in sections(target):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_missing_file_or_section_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Where `it` is rare\n\n[a](#where-it-is-rare) [b](#elsewhere) [c](gone.md) [d](https://example.org/x#y)\n"
    )
    assert broken_links(page) == ["#elsewhere", "gone.md"]
