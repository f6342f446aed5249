"""One skeleton for all pages: what is put into it is text, and nothing else is loaded or run."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from PIL import Image

from common.pages import image_url, render_page

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTILE = "</title></style><script>alert(1)</script><img src=http://evil.example onerror=alert(2)>\"'{{ 7 * 7 }}"


def test_values_are_text_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    template = tmp_path / "a.html.jinja"
    template.write_text(
        '{% extends "page.html.jinja" %}{% block title %}{{ text }}{% endblock %}'
        '{% block content %}<p title="{{ text }}">{{ text }}</p>{% endblock %}'
    )
    tags, texts = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            texts.extend(value for name, value in attrs if name == "title")

        def handle_data(self, data):
            texts.append(data)

    reader = Reader(convert_charrefs=True)
    reader.feed(page := render_page(template, text=HOSTILE))
    reader.close()
    assert texts.count(HOSTILE) == 3 and not {"script", "img", "link", "iframe"} & {*tags}
    assert "default-src 'none'" in page and "url(" not in page and "@import" not in page
    with pytest.raises(UndefinedError):
        render_page(template)


def test_every_page_is_built_on_the_one_skeleton_and_marks_nothing_as_safe() -> None:
    templates = [path for name in ("common", "data_prep", "model", "pipeline", "orchestration", "benchmarks")
                 for path in (REPOSITORY / name).rglob("*.jinja")]  # fmt: skip
    assert len(templates) == 5
    for path in templates:
        text = path.read_text()
        assert path.name == "page.html.jinja" or '{% extends "page.html.jinja" %}' in text
        assert not re.search(r"\|\s*safe|autoescape", re.sub(r"{#.*?#}", "", text, flags=re.DOTALL))
    for name in ("data_prep", "pipeline", "orchestration"):
        for path in (REPOSITORY / name).rglob("*.py"):
            assert "<!doctype" not in path.read_text().lower() and "Environment(" not in path.read_text(), path


def test_an_image_as_a_url_keeps_its_pixels() -> None:
    assert image_url(Image.new("1", (1, 1))).startswith("data:image/png;base64,iVBORw0KGgo")
    assert image_url(Image.new("L", (1, 1)), "JPEG").startswith("data:image/jpeg;base64,/9j/")
