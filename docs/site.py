"""What building the site takes besides mkdocs.yml."""

import re
from pathlib import Path
from typing import Any

import griffe

README = Path(__file__).parents[1] / "README.md"


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """`<!-- README: HEADING -->` becomes that section of the README: numbers stand in one place."""
    return re.sub(r"<!-- README: (.+?) -->", lambda match: _section(match[1]), markdown)


def _section(heading: str) -> str:
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", README.read_text(), re.DOTALL | re.MULTILINE
    )
    if found is None:
        raise ValueError(f"README.md must have a section '## {heading}'")
    return found[1].strip().replace("](docs/", "](")


class Examples(griffe.Extension):
    """A docstring's `Example:` is what the parser knows as `Examples:`, with code to highlight."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
