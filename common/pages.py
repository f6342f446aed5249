"""HTML pages that need no other file: one skeleton and style sheet, and every value escaped."""

import io
from base64 import b64encode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image


def render_page(template: Path, filters: Mapping[str, Callable[..., str]] | None = None, **values: Any) -> str:
    """Returns the page that a template which extends `page.html.jinja` makes of its values.

    Texts of a data set are hostile input: all are escaped, and the page's policy stops what would slip through.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    return environment.get_template(template.name).render(**values)


def image_url(image: Image.Image, kind: str = "PNG") -> str:
    """Returns an image as a data URL, which a page shows without another file."""
    stream = io.BytesIO()
    image.save(stream, kind)
    return f"data:image/{kind.lower()};base64,{b64encode(stream.getvalue()).decode()}"
