"""Links between the pages and the other files of the repository, for the site: a hook of mkdocs.

On a page, `[the launchers](../cluster/README.md)` works where the repository is browsed. The site has only the pages,
so there the link becomes its text and the file's path. A link to a file that does not exist is a warning, which the
strict build takes for an error. The same holds for the pages outside `docs/`, which the site does not have.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = ("*.md", "cluster/*.md", "notebooks/*.md")
"""The pages that the site does not have."""

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")
_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#:\s]+)(?:#[^)\s]*)?\)")
_log = logging.getLogger("mkdocs.hooks.repository_links")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turns links out of `docs/` into text."""

    def spoken(link: re.Match[str]) -> str:
        target = (ROOT / "docs" / link[2]).resolve()
        if not target.exists():
            _log.warning("%s links to %s, which does not exist", page.file.src_uri, link[2])
        path = str(target.relative_to(ROOT))
        label = link[1].strip("`")
        return f"`{path}`" if label in path else f"{link[1]} (`{path}`)"

    return _OUTSIDE.sub(spoken, markdown)


def on_pre_build(**_: Any) -> None:
    """Checks the links of the pages that the site does not have."""
    for page, target in _broken():
        _log.warning("%s links to %s, which does not exist", page.relative_to(ROOT), target)


def _broken() -> Iterator[tuple[Path, str]]:
    for page in (path for pattern in ELSEWHERE for path in sorted(ROOT.glob(pattern))):
        for link in _LINK.finditer(page.read_text(encoding="utf-8")):
            if not (page.parent / link[2]).exists():
                yield page, link[2]
