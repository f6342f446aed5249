"""The plan is a pure function: every fit row once, the same positions for ever, shards filled to their size."""

from array import array

import pytest

from common.console import UsageError
from data_prep.image_roots import ImageEntry
from data_prep.json_rows import Row
from data_prep.plan import (
    Scan,
    Settings,
    build_plan,
    cut_shards,
    differences,
    identity,
    order_rows,
    sample_key,
    scan_rows,
)
from data_prep.tar_writer import member_bytes


def test_order_is_a_permutation_that_the_seed_alone_decides() -> None:
    order = order_rows(1000, Settings(seed=3))
    assert sorted(order) == list(range(1000))
    assert list(order) == list(order_rows(1000, Settings(seed=3, shard_bytes=5)))
    assert list(order) != list(order_rows(1000, Settings(seed=4)))
    assert list(order_rows(4, Settings(shuffle=False))) == [0, 1, 2, 3]


def test_order_is_the_same_on_every_machine_and_version() -> None:
    assert list(order_rows(8, Settings(seed=0))) == [3, 2, 1, 6, 0, 7, 4, 5]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([3], [range(0, 1)]),
        ([4, 6, 1], [range(0, 2), range(2, 3)]),  # exactly full
        ([11, 1, 30, 2], [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]),  # too big for a shard: alone in one
        ([1] * 25, [range(0, 10), range(10, 20), range(20, 25)]),
    ],
)
def test_shards_are_cut_at_ten_bytes(sizes: list[int], expected: list[range]) -> None:
    assert list(cut_shards(sizes, 10)) == expected


def test_every_place_is_in_exactly_one_shard() -> None:
    scan = Scan(indices=array("q", range(100)), sample_bytes=array("q", [37 * i % 101 + 1 for i in range(100)]))
    plan = build_plan(scan, Settings(shard_bytes=500))
    positions = [position for shard in plan.shards for position in shard]
    assert positions == list(range(100)) and len(plan.shards) > 5
    totals = [sum(scan.sample_bytes[plan.order[position]] for position in shard) for shard in plan.shards]
    assert max(totals) <= 500 and min(totals[:-1]) > 500 - 101


def rows_and_files(num_spaces: int = 0) -> tuple[list[Row], dict[str, ImageEntry]]:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "yes"}]
    values = [{"image": f"{i}.jpg", "conversations": turns} for i in range(4)] + [{"image": "5.jpg"}]
    rows = [Row(i, 1000 * i, 90 + num_spaces, value) for i, value in enumerate(values)]
    return rows, {f"{i}.jpg": ImageEntry(f"{i}.jpg", f"/x/{i}.jpg", 100 * i, 7) for i in (0, 1, 3)}


def test_scan_keeps_fit_rows_and_refuses_the_rest() -> None:
    rows, files = rows_and_files()
    scan = scan_rows(rows, files.get)
    assert (scan.num_rows, list(scan.indices), list(scan.offsets)) == (5, [0, 1, 3], [0, 1000, 3000])
    assert [(reject.index, reject.kind, reject.file) for reject in scan.rejects] == [
        (2, "image_missing", "2.jpg"),
        (4, "conversations", None),
    ]
    assert scan.sample_bytes[2] - scan.sample_bytes[0] == member_bytes(300) - member_bytes(0)


def test_scan_tells_changed_images_but_not_another_spelling_of_the_json() -> None:
    rows, files = rows_and_files()
    base = scan_rows(rows, files.get)
    spaced = scan_rows(rows_and_files(num_spaces=50)[0], files.get)
    assert (spaced.images_sha256, spaced.sample_bytes) == (base.images_sha256, base.sample_bytes)
    larger = scan_rows(rows, (files | {"1.jpg": files["1.jpg"]._replace(num_bytes=101)}).get)
    found = scan_rows(rows, (files | {"2.jpg": files["1.jpg"]}).get)
    touched = scan_rows(rows, (files | {"1.jpg": files["1.jpg"]._replace(version=8)}).get)
    assert len({base.images_sha256, larger.images_sha256, found.images_sha256}) == 3
    assert touched.images_sha256 == base.images_sha256 and touched.modified_sha256 != base.modified_sha256


def test_duplicates_are_refused_on_request_whatever_their_ids() -> None:
    rows, files = rows_and_files()
    again = [Row(9, 9000, 90, rows[1].value | {"id": "other", "score": 2}), Row(10, 9100, 90, rows[0].value)]
    other = Row(
        11,
        9200,
        90,
        rows[3].value | {"conversations": [{"from": "human", "value": "<image> "}, {"from": "gpt", "value": "no"}]},
    )
    kept = scan_rows([*rows, *again, other], files.get, deduplicate=True)
    assert list(kept.indices) == [0, 1, 3, 11]
    assert [(reject.index, reject.reason) for reject in kept.rejects if reject.kind == "duplicate"] == [
        (9, "the same images and conversations as the row at index 1"),
        (10, "the same images and conversations as the row at index 0"),
    ]
    assert len(scan_rows([*rows, *again, other], files.get).indices) == 6


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"check": "none"}, "--check none is unknown"),
        ({"resize_longest": 0}, "--resize-longest 0"),
        ({"resize_longest": 9, "check": "header"}, "leave --check at decode"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Settings(**settings)


def test_keys_sort_as_they_count_and_hold_no_dot() -> None:
    keys = [sample_key(position) for position in (0, 9, 10, 665_297, 999_999_999)]
    assert keys == sorted(keys) and len({len(key) for key in keys}) == 1 and not any("." in key for key in keys)


def test_differences_name_what_the_user_set() -> None:
    scan = Scan(images_sha256="i")
    before, now = identity(scan, Settings(), "aa"), identity(scan, Settings(seed=1, shard_bytes=9), "bb")
    assert differences(before, before) == []
    assert differences(before, now) == [
        "other data",
        "shard-bytes was 256000000, is 9",
        "seed was 0, is 1",
    ]
