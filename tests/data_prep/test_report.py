"""The report counts every sample once, shows what it drew, and lets no text of a data set become part of the page."""

import io
import json
import random
import re
from base64 import b64decode
from collections import Counter
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from upath import UPath
from webdataset.autodecode import imagehandler

from data_prep.listings import read_manifest
from data_prep.plan import Settings
from data_prep.report import build_tasks, count_rejects, main, percent_text, size_text, source_rows
from data_prep.report_shard import ShardReport, read_shard, thumbnail
from data_prep.report_stats import NO_FOLDER, NO_IMAGE, Stats, bars, merge, percentile, shown
from data_prep.shards import make_shards
from data_prep.sidecars import ReadTask
from tests.command_line import run_command

pytestmark = pytest.mark.usefixtures("local_ray")
SMALL = Settings(shard_bytes=12_000)
HOSTILE = '</div></article><script>alert("1")</script><img src=http://evil.example/x onerror=alert(2)> {{ 7 * 7 }}'


run_cli = partial(run_command, main)


def read_all(out: Path, **options) -> list[ShardReport]:
    shards = read_manifest(out).shards
    return [read_shard(task) for task in build_tasks(out, shards, **{"num_samples": 0, "seed": 0, **options})]


def merged(reports: list[ShardReport]) -> Stats:
    stats: Stats = {}
    for report in reports:
        merge(stats, report.stats)
    return stats


class Page(HTMLParser):
    """What a browser would make of a page: its tags, their attributes, and the text of each turn shown."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.resources, self.turns = Counter(), [], []
        self._in_turn = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.resources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)
        self._in_turn |= tag == "div" and (dict(attrs).get("class") or "").startswith("turn ")
        if self._in_turn and tag == "div":
            self.turns.append("")

    def handle_endtag(self, tag):
        self._in_turn &= tag != "div"

    def handle_data(self, data):
        if self._in_turn:
            self.turns[-1] += data


def test_every_sample_is_counted_once(dataset, tmp_path: Path) -> None:
    assert make_shards(dataset.data, dataset.images, tmp_path / "out", SMALL)["num_shards"] > 3
    stats = merged(read_all(tmp_path / "out"))
    assert stats["sample_kb"].total() == 30
    assert stats["answer_words"] == {1: 27, 2: 6}
    assert stats["question_words"] == {3: 24, 2: 3, 5: 3, 1: 3}  # <image> is no word
    assert stats["rounds"] == {1: 27, 2: 3}
    assert stats["conversation_characters"] == {14: 13, 15: 14, 40: 3}
    assert stats["num_images"] == {0: 3, 1: 24, 2: 3}
    assert stats["source_samples"] == {NO_FOLDER: 19, "deep": 9, NO_IMAGE: 3}  # one sample has images of both
    assert stats["source_images"] == {NO_FOLDER: 21, "deep": 9}
    assert stats["format"] == {"PNG": 13, "JPEG": 9, "GIF": 8}
    assert stats["longest_side"] == {20: 11, **{16 + i: 1 for i in range(5, 24)}}
    assert stats["shortest_side"] == {16: 4, 17: 2, 18: 1, 19: 3, 20: 20}
    assert (stats["aspect_ratio"][0.8], stats["aspect_ratio"][1.95]) == (4, 1)
    assert "shrunk" not in stats


def test_shards_add_up_in_any_order(dataset, tmp_path: Path) -> None:
    for name, settings in (("many", SMALL), ("one", Settings())):
        make_shards(dataset.data, dataset.images, tmp_path / name, settings)
    reports = read_all(tmp_path / "many")
    expected = merged(read_all(tmp_path / "one"))
    for seed in range(3):
        assert merged(random.Random(seed).sample(reports, len(reports))) == expected


def test_shrunk_images_are_counted(dataset, tmp_path: Path) -> None:
    make_shards(dataset.data, dataset.images, tmp_path / "out", Settings(resize_longest=30))
    stats = merged(read_all(tmp_path / "out"))
    assert stats["shrunk"] == {1: 9} and max(stats["longest_side"]) == 30  # 31 to 39 pixels wide


def test_a_url_is_read_as_a_folder_is(dataset, tmp_path: Path) -> None:
    make_shards(dataset.data, dataset.images, tmp_path / "out", Settings())
    store = UPath("memory://report-test")
    for path in (tmp_path / "out").iterdir():
        (store / path.name).write_bytes(path.read_bytes())
    (shard,), chosen = read_manifest(tmp_path / "out").shards, (3, 17)
    assert read_shard(ReadTask(store, shard, chosen)) == read_shard(ReadTask(tmp_path / "out", shard, chosen))


def test_percentiles_are_values_that_occur() -> None:
    counts = Counter(range(1, 201))
    assert [percentile(counts, percent) for percent in (1, 50, 95, 99, 100)] == [2, 100, 190, 198, 200]
    assert [percentile(Counter({5: 1, 7: 1}), percent) for percent in (1, 50, 51, 100)] == [5, 5, 7, 7]


def test_bars_hold_every_value_once_and_say_which() -> None:
    narrow = [(3, "0", "0", False), (24, "1", "1", False), (0, "2", "2", False), (3, "3", "3", False)]
    assert bars(Counter({0: 3, 1: 24, 3: 3})) == narrow
    wide = bars(Counter({**dict.fromkeys(range(7, 107), 10), 5_000: 1}))
    assert [bar[:2] for bar in wide[:2]] == [(30, "5 to 9"), (50, "10 to 14")]
    assert wide[-2:] == [(20, "105 to 109", "", False), (1, "110 or more", "more", True)]
    assert sum(bar.num_values for bar in wide) == 1001 and wide[0].label == "5"
    ratios = bars(Counter({0.29: 1, 0.3: 1, 0.7: 5, 1.5: 2}), unit=0.01)
    assert [(bar.num_values, bar.title) for bar in ratios if bar.num_values] == [
        (1, "0.25 to 0.29"), (1, "0.3 to 0.34"), (5, "0.7 to 0.74"), (2, "1.5 to 1.54")
    ]  # fmt: skip


def test_numbers_are_written_for_people() -> None:
    assert [shown(value) for value in (0, 100, 1234567, 0.75, 1.0, 1.5)] == [
        "0",
        "100",
        "1,234,567",
        "0.75",
        "1",
        "1.5",
    ]
    sizes = {400: "0.4 kB", 999_999: "1,000.0 kB", 2_500_000: "2.5 MB", 170 * 10**9: "170.0 GB"}
    assert {size: size_text(size) for size in sizes} == sizes
    parts = {0: "0.0%", 1: "<0.1%", 10: "0.1%", 3333: "33.3%", 10_000: "100.0%"}
    assert {part: percent_text(part, 10_000) for part in parts} == parts and percent_text(0, 0) == "0.0%"


def test_sources_without_any_folder_are_called_after_their_roots() -> None:
    images = {"source_images": Counter({NO_FOLDER: 5}), "source_samples": Counter({NO_FOLDER: 4, NO_IMAGE: 4})}
    assert source_rows(images, ["a.zip", "b"]) == [("a.zip, b (no folders)", 4, 5), (NO_IMAGE, 4, 0)]
    images["source_images"]["coco"] = images["source_samples"]["coco"] = 9
    assert [name for name, *_ in source_rows(images, ["a.zip"])] == ["coco", NO_FOLDER, NO_IMAGE]


def test_the_page_is_one_file_that_depends_on_the_seed_alone(dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_shards(dataset.data, dataset.images, out, SMALL)
    status, said = run_cli(out)
    first = (out / "report.html").read_text()
    assert status == 0 and f"written to {out / 'report.html'} (" in said and "30 samples looked at, 30 shown" in said
    keys = re.findall(r"<code>(\d{9})</code>", first)
    assert keys == [f"{place:09d}" for place in range(30)]  # there are no more than 30
    pages = []
    for seed, workers in ((1, 1), (1, 2), (2, 2)):
        page = tmp_path / f"{seed}-{workers}.html"
        assert run_cli(out, "--html", page, "--num-samples", 6, "--seed", seed, "--workers", workers)[0] == 0
        pages.append(page.read_text())
    assert pages[0] == pages[1]
    chosen = [re.findall(r"<code>(\d{9})</code>", page) for page in pages[1:]]
    assert [len(keys) for keys in chosen] == [6, 6] and chosen[0] != chosen[1]
    for text in (first, *pages):
        page = Page(text)
        assert page.resources and all(resource.startswith("data:image/") for resource in page.resources)
        assert page.tags["script"] == page.tags["link"] == 0 and "url(" not in text and "@import" not in text
        assert "default-src 'none'" in text and page.tags["svg"] == 9
    assert "0 found under another extension" in re.sub(r"\s+", " ", first) and "30</b>" in first


def test_hostile_texts_are_shown_and_not_obeyed(dataset, tmp_path: Path) -> None:
    (dataset.images / "<b>.png").write_bytes((dataset.images / "0.png").read_bytes())
    turns = [{"from": "system", "value": HOSTILE}, {"from": "human", "value": f"<image>{HOSTILE}"}]
    row = {"id": HOSTILE, "image": "<b>.png", "conversations": [*turns, {"from": "gpt", "value": HOSTILE}]}
    missing = row | {"image": "<script>missing</script>.png"}
    dataset.data.write_text(json.dumps([row, missing, *dataset.rows]))
    make_shards(dataset.data, dataset.images, tmp_path / "out", SMALL, max_bad_fraction=0.1)
    assert run_cli(tmp_path / "out")[0] == 0
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.tags["script"] == page.tags["html"] - 1 == 0 and page.tags["article"] == 31
    assert page.tags["img"] == len(page.resources) and not any("evil" in resource for resource in page.resources)
    assert [f"system{HOSTILE}", f"human<image>{HOSTILE}", f"gpt{HOSTILE}"] == [t for t in page.turns if HOSTILE in t]
    assert "<script" not in text and "&lt;script&gt;missing&lt;/script&gt;.png" in text and "{{ 7 * 7 }}" in text


def test_refusals_are_counted_by_kind_with_the_first_as_example(dataset, tmp_path: Path) -> None:
    turns = dataset.rows[0]["conversations"]
    gone = [{"id": f"gone-{i}", "image": f"none-{i}.jpg", "conversations": turns} for i in range(2)]
    dataset.data.write_text(json.dumps([{"id": "empty"}, *gone, *dataset.rows]))
    make_shards(dataset.data, dataset.images, tmp_path / "out", SMALL, max_bad_fraction=0.2)
    found = [(kind, num_rows, first.index) for kind, num_rows, first in count_rejects(tmp_path / "out")]
    assert found == [("image_missing", 2, 1), ("conversations", 1, 0)]
    assert run_cli(tmp_path / "out", "--num-samples", 0)[0] == 0
    text = re.sub(r"\s+", " ", (tmp_path / "out" / "report.html").read_text())
    assert '<td class="kind">image_missing</td><td class="number">2</td>' in text and "6.1%" in text
    assert "record gone-0 (index 1): no such image under --images <code>none-0.jpg</code>" in text
    assert "gone-1" not in text and "<article" not in text


def test_images_that_do_not_decode_are_said_to_be_so(dataset, tmp_path: Path) -> None:
    broken = dataset.images / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    make_shards(dataset.data, dataset.images, tmp_path / "out", Settings(check="header"))
    (report,) = read_all(tmp_path / "out", num_samples=30)
    bad = {card.record["source_index"]: card.thumbnails for card in report.cards if None in card.thumbnails}
    assert bad.keys() == {0, 27, 28, 29} and bad[0] == [None] and bad[27][1] is not None
    assert run_cli(tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "report.html").read_text().count("does not decode") == 4


def test_formats_that_plain_readers_do_not_decode_are_marked(dataset, tmp_path: Path) -> None:
    """What webdataset's own decoder says of files with these names."""
    files = {"AVIF": "avif", "JPEG2000": "jp2", "QOI": "qoi"}
    for kind, path in zip(files, sorted(dataset.images.glob("*.png")), strict=False):
        Image.new("RGB", (20, 20)).save(path, kind)
    make_shards(dataset.data, dataset.images, tmp_path / "out", Settings())
    assert run_cli(tmp_path / "out")[0] == 0
    text = (tmp_path / "out" / "report.html").read_text()
    marked = re.findall(r"<td>(\w+) <span class=\"quiet\">\(left as bytes by webdataset's own decoder\)", text)
    stream = io.BytesIO()
    Image.new("RGB", (2, 2)).save(stream, "PNG")
    decode = imagehandler("pil")
    assert {*marked} == {kind for kind, name in files.items() if decode(f"a.{name}", stream.getvalue()) is None}
    assert {*marked} == {"AVIF", "QOI"} and "<td>JPEG2000</td>" in text


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [("RGB", (10, 20, 200), (10, 20, 200)), ("I;16", 128 * 257, (128,) * 3), ("RGBA", (9, 9, 9, 0), (255,) * 3)],
)
def test_thumbnails_are_small_and_look_like_the_image(mode: str, color, expected: tuple) -> None:
    stream = io.BytesIO()
    Image.new(mode, (1000, 500), color).save(stream, "PNG")
    uri = thumbnail(stream.getvalue())
    assert uri and uri.startswith("data:image/png;base64,")
    with Image.open(io.BytesIO(b64decode(uri.partition(",")[2]))) as small:
        assert (small.size, small.getpixel((100, 100))) == ((256, 128), expected)


def test_a_folder_that_is_not_finished_or_not_whole_is_refused(dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, said = run_cli(out)
    assert status == 1 and f"error: {out}: no shards here; name what `make shards` wrote" in said
    make_shards(dataset.data, dataset.images, out, Settings())
    tar = out / "shard-000000.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) // 2])
    status, said = run_cli(out, "--num-samples", 0)
    assert status == 1 and re.search(r"error: shard-000000\.tar: the record of sample \d{9} cannot be read", said)
    last = json.loads((out / "shard-000000.json").read_text())["offsets"][-1]
    tar.write_bytes(data[: last + 600] + b"x" + data[last + 601 :])
    status, said = run_cli(out)
    assert status == 1 and "error: shard-000000.tar: sample 000000029 is damaged (checksum); delete it and" in said
    tar.unlink()
    status, said = run_cli(out)
    assert status == 1 and f"error: {tar}: No such file or directory" in said
    (out / "shard-000000.json").write_text("{}")
    status, said = run_cli(out)
    wrong = "its bytes differ from the SHA-256 in manifest.json; delete it and run the same"
    assert status == 1 and f"error: shard-000000.json: {wrong}" in said
    assert not (out / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--workers", 0], "--workers 0 must be at least 1"),
        (["--num-samples", -1], "--num-samples -1 must not be negative"),
        (["--html", "/no/such/a.html"], "/no/such is no folder to write to; name a file with --html"),
    ],
)
def test_a_wrong_command_line_ends_with_2(dataset, tmp_path: Path, arguments: list, named: str) -> None:
    make_shards(dataset.data, dataset.images, tmp_path / "out", Settings())
    status, said = run_cli(tmp_path / "out", *arguments)
    assert status == 2 and named in said
