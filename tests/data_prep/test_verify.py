"""Whatever is damaged in a shard directory is named exactly, and what the message advises repairs it."""

import errno
import io
import json
import re
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from webdataset.compat import WebDataset

from data_prep import verify, verify_shard
from data_prep.listings import ShardEntry, file_digest, inspect_listings, read_listings, with_own_digest
from data_prep.plan import Settings
from data_prep.shards import make_shards
from data_prep.sidecars import ReadTask
from data_prep.tar_writer import END_OF_ARCHIVE
from data_prep.verify import main, verify_shards
from data_prep.verify_shard import MAX_NAMED, Problem, shorten
from tests.command_line import run_command

pytestmark = pytest.mark.usefixtures("local_ray")
DAMAGED = "bytes differ from the checksum"
DIFFERS = "its bytes differ from the size and SHA-256 in the manifest"
OWN = "manifest.json: its bytes differ from its own SHA-256"
PLAN_DIFFERS = OWN.replace("manifest", "plan")


class Shards:
    """A finished directory: 32 samples, one row refused before it was planned, one alone in a shard of its own.

    Of the shard `tar`, the second sample is the one to damage: `at` is where it begins, `image_at` where the header of
    its image does, and `end` where it ends.
    """

    def __init__(self, dataset, out: Path) -> None:
        self.dataset, self.out = dataset, out
        turns = dataset.rows[0]["conversations"]
        for i in (30, 31):
            Image.effect_noise((90, 90), 60).save(dataset.images / f"{i}.png")
        (dataset.images / "noise.png").write_bytes(bytes(20_000))  # more than a shard takes
        more = {"noise": "noise.png", "gone": "gone.png", "r30": "30.png", "r31": "31.png"}
        rows = [*dataset.rows, *({"id": name, "image": path, "conversations": turns} for name, path in more.items())]
        dataset.data.write_text(json.dumps(rows))
        self.make()
        listed = json.loads((out / "manifest.json").read_text())["shards"]
        (self.refused,) = (out / shard["tar"] for shard in listed if not shard["num_samples"])
        self.tar = next(out / shard["tar"] for shard in listed if shard["num_samples"] > 4)
        sidecar = json.loads(self.tar.with_suffix(".json").read_text())
        self.keys, self.offsets, self.num_bytes = sidecar["keys"], sidecar["offsets"], sidecar["bytes"]
        self.at, self.end = sidecar["offsets"][1:3]
        blocks = self.tar.read_bytes()[self.at : self.end]
        record = blocks[512:].split(b"\0")[0]
        self.image_at = self.at + 512 + len(record) + -len(record) % 512
        self.source = "record {id}, index {source_index}".format_map(json.loads(record))

    def make(self) -> None:
        make_shards(
            self.dataset.data, self.dataset.images, self.out, Settings(shard_bytes=12_000), max_bad_fraction=0.1
        )

    def sample(self, number: int) -> str:
        return f"{self.tar.name}: sample {self.keys[number]}"


@pytest.fixture
def shards(dataset, tmp_path: Path) -> Shards:
    return Shards(dataset, tmp_path / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def edit(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(path: Path, place: int) -> None:
    edit(path, lambda data: data.__setitem__(place, data[place] ^ 1))


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))


def problems(out: Path, capsys: pytest.CaptureFixture) -> tuple[list[str], str]:
    """Returns the lines about problems, sorted, and the closing error."""
    capsys.readouterr()
    with pytest.raises(ValueError) as raised:
        verify_shards(out)
    lines = capsys.readouterr().err.splitlines()
    return sorted(line for line in lines if re.match(r"[\w.-]+: ", line)), str(raised.value)


def check_advice(shards: Shards, before: dict[str, bytes], lines: list[str]) -> None:
    """Does what the error says, literally: afterwards everything is as it was, and whole shards were not written."""
    named = {name for line in lines for name in re.findall(r"[\w.-]+\.(?:tar|jsonl|json|part)\b", line)}
    times = {path.name: path.stat().st_mtime_ns for path in shards.out.glob("shard-*")}
    for name in named:
        (shards.out / name).unlink(missing_ok=True)
    shards.make()
    assert contents(shards.out) == before
    stems = {Path(name).stem for name in named}
    for path in shards.out.glob("shard-*"):
        assert path.stem in stems or path.stat().st_mtime_ns == times[path.name]
    assert verify_shards(shards.out)["num_samples"] == 32


def test_a_whole_directory_passes_with_what_other_tools_keep_there(shards: Shards, capsys) -> None:
    (shards.out / ".nv-meta").mkdir()
    for name in (".nv-meta/index.sqlite", f"{shards.tar.name}.idx", ".lock", "report.html", "notes.json"):
        (shards.out / name).touch()
    manifest = verify_shards(shards.out)
    assert manifest == json.loads((shards.out / "manifest.json").read_text()) and manifest["num_rejected"] == 2
    said = f"32 samples in {manifest['num_shards']} shards, every byte as it was written"
    assert said in capsys.readouterr().err.splitlines()


# The place of a flipped byte in the tar, and whether the record can still be read.
FLIPS = {
    "image": (lambda shards: shards.image_at + 520, True),
    "header of the image": (lambda shards: shards.image_at, True),
    "header of the record": (lambda shards: shards.at + 130, True),
    "padding": (lambda shards: shards.end - 1, True),
    "record": (lambda shards: shards.at + 512, False),
}


@pytest.mark.parametrize("where", FLIPS)
def test_a_flipped_byte_names_its_sample(shards: Shards, capsys, where: str) -> None:
    before, (place, can_be_read) = contents(shards.out), FLIPS[where]
    assert before[shards.tar.name][shards.end - 1] == 0  # there is padding
    flip(shards.tar, place(shards))
    lines, error = problems(shards.out, capsys)
    source = f" ({shards.source})" if can_be_read else ""
    assert lines == [f"{shards.sample(1)}{source}: {DAMAGED}"]
    num_shards = json.loads(before["manifest.json"])["num_shards"]
    assert error == (
        f"{shards.out}: 1 problem, 1 of {num_shards} shards damaged; "
        "delete the files named above and run the same `make shards` again: it writes these alone"
    )
    check_advice(shards, before, lines)


def cut_in_a_sample(shards: Shards) -> list[str]:
    """Between the record and the image: where tar readers see an end and no error."""
    cut(shards.tar, shards.image_at)
    size = shards.end - shards.at
    return [
        f"{shards.sample(1)} ({shards.source}): cut short: {shards.image_at - shards.at:,} of {size:,} bytes",
        f"{shards.tar.name}: samples {shards.keys[2]} to {shards.keys[-1]}: missing, "
        f"the tar ends at byte {shards.image_at:,} of {shards.num_bytes:,}",
    ]


def cut_at_the_last_sample(shards: Shards) -> list[str]:
    cut(shards.tar, shards.offsets[-1])
    ends = f"the tar ends at byte {shards.offsets[-1]:,} of {shards.num_bytes:,}"
    return [f"{shards.sample(-1)}: missing, {ends}"]


def zeroed_header(shards: Shards) -> list[str]:
    edit(shards.tar, lambda data: data.__setitem__(slice(shards.at, shards.at + 512), bytes(512)))
    return [f"{shards.sample(1)} ({shards.source}): {DAMAGED}"]


def flipped_end(shards: Shards) -> list[str]:
    flip(shards.tar, -600)
    return [f"{shards.tar.name}: the end-of-archive blocks are not zero; no sample is touched"]


def cut_end(shards: Shards) -> list[str]:
    cut(shards.tar, -1024)
    return [f"{shards.tar.name}: the end-of-archive blocks are cut short: 0 of 1,024 bytes; no sample is touched"]


def trailing_bytes(shards: Shards) -> list[str]:
    edit(shards.tar, lambda data: data.extend(bytes(1500)))
    return [f"{shards.tar.name}: 1,500 bytes follow the end of the archive; no sample is touched"]


def same_checksum(shards: Shards) -> list[str]:
    """Adding the generator of CRC-32 changes 5 bytes and no CRC-32."""
    generator = int(f"{0x104C11DB7:033b}"[::-1], 2).to_bytes(5, "little")
    before = zlib.crc32(shards.tar.read_bytes())
    for i, byte in enumerate(generator):
        edit(shards.tar, lambda data, i=i, byte=byte: data.__setitem__(600 + i, data[600 + i] ^ byte))
    assert zlib.crc32(shards.tar.read_bytes()) == before
    return [f"{shards.tar.name}: bytes differ from its SHA-256, though every sample has its CRC-32"]


def missing_tar(shards: Shards) -> list[str]:
    shards.tar.unlink()
    return [f"{shards.tar.name}: is missing"]


def missing_sidecar(shards: Shards) -> list[str]:
    shards.tar.with_suffix(".json").unlink()
    return [f"{shards.tar.stem}.json: is missing; the tar is whole"]


def cut_sidecar(shards: Shards) -> list[str]:
    cut(shards.tar.with_suffix(".json"), -10)
    return [f"{shards.tar.stem}.json: its bytes differ from the SHA-256 in manifest.json; the tar is whole"]


def flipped_sidecar_and_tar(shards: Shards) -> list[str]:
    flip(shards.tar, shards.at)
    flip(shards.tar.with_suffix(".json"), 200)
    return [
        f"{shards.tar.stem}.json: its bytes differ from the SHA-256 in manifest.json",
        f"{shards.tar.name}: bytes differ from the SHA-256 in manifest.json; no sidecar says in which samples",
    ]


def missing_shard_of_refused_rows(shards: Shards) -> list[str]:
    shards.refused.unlink()
    shards.refused.with_suffix(".json").unlink()
    return [f"{shards.refused.stem}.json: is missing", f"{shards.refused.name}: is missing"]


def flipped_tar_of_refused_rows(shards: Shards) -> list[str]:
    flip(shards.refused, 0)
    return [f"{shards.refused.name}: the end-of-archive blocks are not zero; no sample is touched"]


def flipped_name_in_the_sidecar_of_refused_rows(shards: Shards) -> list[str]:
    replace(shards.refused.with_suffix(".json"), "crc32", "crc33")
    return [f"{shards.refused.stem}.json: its bytes differ from the SHA-256 in manifest.json; the tar is whole"]


def flipped_text_in_the_sidecar_of_refused_rows(shards: Shards) -> list[str]:
    replace(shards.refused.with_suffix(".json"), '"id":"noise"', '"id":"nohse"')
    return [f"{shards.refused.stem}.json: its bytes differ from the SHA-256 in manifest.json; the tar is whole"]


def extra_files(shards: Shards) -> list[str]:
    for name in ("shard-000000.tar.0123456789ab.part", "shard-000999.tar", "shard-000999.json", "old.tar"):
        (shards.out / name).write_bytes(END_OF_ARCHIVE)
    strange = "does not belong here, manifest.json does not list it"
    return [
        f"old.tar: {strange}",
        "shard-000000.tar.0123456789ab.part: was left by a run that was stopped",
        f"shard-000999.json: {strange}",
        f"shard-000999.tar: {strange}",
    ]


def edited_count(shards: Shards) -> list[str]:
    replace(shards.out / "manifest.json", '"num_samples": 32', '"num_samples": 33')
    return [OWN, "manifest.json: num_samples is 33, the shards give 32"]


def edited_images_of_a_shard(shards: Shards) -> list[str]:
    manifest = json.loads((shards.out / "manifest.json").read_text())
    (entry,) = (shard for shard in manifest["shards"] if shard["tar"] == shards.tar.name)
    was = entry["num_images"]
    entry["num_images"] = was + 1
    (shards.out / "manifest.json").write_text(json.dumps(manifest))
    return [OWN, f"manifest.json: shards {shards.tar.name} num_images is {was + 1}, the shards give {was}"]


def edited_fingerprint(shards: Shards) -> list[str]:
    was = json.loads((shards.out / "manifest.json").read_text())["fingerprint"]
    replace(shards.out / "manifest.json", was, was[::-1])
    return [OWN, f"manifest.json: fingerprint is {was[::-1]}, the shards give {was}"]


def edited_index(shards: Shards) -> list[str]:
    index = json.loads((shards.out / "index.json").read_text())
    name, was = index["shards"][0]["raw_data"]["basename"], index["shards"][0]["size_limit"]
    replace(shards.out / "index.json", f'"size_limit":{was}', '"size_limit":700')
    return [f"index.json: {DIFFERS}", f"index.json: shards {name} size_limit is 700, the shards give {was}"]


def with_new_digests(change: Callable[[Shards], list[str]]) -> Callable[[Shards], list[str]]:
    """Returns a change after which every listing has its digest: as if it had been written so."""

    def damage(shards: Shards) -> list[str]:
        lines = change(shards)
        manifest = json.loads((shards.out / "manifest.json").read_text())
        manifest["index"] = file_digest((shards.out / "index.json").read_bytes()).model_dump()
        (shards.out / "manifest.json").write_bytes(with_own_digest(manifest))
        return [line for line in lines if line != OWN and not line.endswith(DIFFERS)]

    return damage


def new_digests_of_another_fingerprint(shards: Shards) -> list[str]:
    return ["manifest.json: its fingerprint is not that of its shards", *with_new_digests(edited_fingerprint)(shards)]


REJECTS_DIFFER = f"rejects.jsonl: {DIFFERS}"


def damaged_plan(shards: Shards) -> list[str]:
    (shards.out / "plan.json").write_text("{")
    return [PLAN_DIFFERS]


def other_plan(shards: Shards) -> list[str]:
    """It is whole, but of another run."""
    plan = json.loads((shards.out / "plan.json").read_text())
    (shards.out / "plan.json").write_bytes(with_own_digest(plan | {"identity": plan["identity"] | {"seed": 7}}))
    return ["plan.json: is not that of these shards"]


def plan_of_nothing(shards: Shards) -> list[str]:
    (shards.out / "plan.json").write_bytes(with_own_digest({"identity": None}))
    return ["plan.json: is not that of these shards"]


def plan_that_does_not_say(shards: Shards) -> list[str]:
    (shards.out / "plan.json").write_bytes(with_own_digest({"version": 2}))
    return ["plan.json: is not that of these shards"]


def missing_plan(shards: Shards) -> list[str]:
    (shards.out / "plan.json").unlink()
    return ["plan.json: is missing"]


def damaged_plan_and_index(shards: Shards) -> list[str]:
    return [*damaged_plan(shards), *edited_index(shards)]


def lost_reject(shards: Shards) -> list[str]:
    path = shards.out / "rejects.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[1])
    return [REJECTS_DIFFER]


def edited_reject(shards: Shards) -> list[str]:
    """Of a row that was refused before it was planned: no sidecar knows it."""
    replace(shards.out / "rejects.jsonl", '"gone"', '"done"')
    return [REJECTS_DIFFER]


def cut_rejects(shards: Shards) -> list[str]:
    cut(shards.out / "rejects.jsonl", -1)
    return [REJECTS_DIFFER]


def edited_size_of_rejects_and_a_missing_sidecar(shards: Shards) -> list[str]:
    """Rejects are checked whatever the shards are like."""
    num_bytes = (shards.out / "rejects.jsonl").stat().st_size
    replace(shards.out / "manifest.json", f'"bytes": {num_bytes},', f'"bytes": {num_bytes + 1},')
    return [OWN, REJECTS_DIFFER, *missing_sidecar(shards)]


def edited_counts_of_rejects(shards: Shards) -> list[str]:
    replace(shards.out / "manifest.json", '"num_rows": 34', '"num_rows": 35')
    replace(shards.out / "manifest.json", '"num_rejected": 2', '"num_rejected": 3')
    return [OWN, "rejects.jsonl: holds 2 rows, manifest.json counts 3"]


def missing_rejects(shards: Shards) -> list[str]:
    (shards.out / "rejects.jsonl").unlink()
    return ["rejects.jsonl: is missing"]


@pytest.mark.parametrize(
    "damage",
    [
        cut_in_a_sample,
        cut_at_the_last_sample,
        zeroed_header,
        flipped_end,
        cut_end,
        trailing_bytes,
        same_checksum,
        missing_tar,
        missing_sidecar,
        cut_sidecar,
        flipped_sidecar_and_tar,
        missing_shard_of_refused_rows,
        flipped_tar_of_refused_rows,
        flipped_name_in_the_sidecar_of_refused_rows,
        flipped_text_in_the_sidecar_of_refused_rows,
        extra_files,
        edited_count,
        edited_images_of_a_shard,
        edited_fingerprint,
        edited_index,
        lost_reject,
        edited_reject,
        cut_rejects,
        edited_size_of_rejects_and_a_missing_sidecar,
        edited_counts_of_rejects,
        with_new_digests(edited_count),
        with_new_digests(edited_images_of_a_shard),
        new_digests_of_another_fingerprint,
        with_new_digests(edited_index),
        with_new_digests(edited_counts_of_rejects),
        missing_rejects,
        damaged_plan,
        other_plan,
        missing_plan,
        plan_of_nothing,
        plan_that_does_not_say,
        damaged_plan_and_index,
    ],
)
def test_damage_is_named_and_the_advice_repairs_it(shards: Shards, capsys, damage: Callable) -> None:
    before = contents(shards.out)
    expected = damage(shards)
    lines, _ = problems(shards.out, capsys)
    assert lines == sorted(expected)
    check_advice(shards, before, lines)


def test_every_byte_of_the_shards_is_covered(shards: Shards) -> None:
    """One bit of each byte of a sidecar, and of every 13th of its tar, is flipped in turn."""
    files = [(shards.tar, 13), (shards.tar.with_suffix(".json"), 1)]
    tasks = verify.build_tasks(shards.out, read_listings(shards.out))
    (task,) = (task for task in tasks if str(task) == shards.tar.name)
    assert verify_shard.verify_shard(task).problems == []
    for path, step in files:
        whole = path.read_bytes()
        for place in range(0, len(whole), step):
            flip(path, place)
            assert verify_shard.verify_shard(task).problems, f"{path.name} byte {place}"
            path.write_bytes(whole)


@pytest.mark.parametrize("how", ["cut", "zeroed"])
def test_webdataset_reads_a_cut_tar_without_an_error(realdata: Path, tmp_path: Path, capsys, how: str) -> None:
    """500 samples, of which a plain reader sees 250 and takes them for all; the index tells the others."""
    folder, rows, out = realdata / "easy_vqa", tmp_path / "rows.json", tmp_path / "out"
    rows.write_text(json.dumps(json.loads((folder / "llava_train.json").read_text())[:500]))
    make_shards(rows, folder, out, Settings())
    tar = out / "shard-000000.tar"
    half = json.loads((out / "shard-000000.json").read_text())["offsets"][250]
    if how == "cut":
        cut(tar, half)
        said = "shard-000000.tar: samples 000000250 to 000000499: missing, the tar ends at byte"
    else:
        edit(tar, lambda data: data.__setitem__(slice(half, half + 512), bytes(512)))
        said = "shard-000000.tar: sample 000000250 (record "
    assert len(list(WebDataset([str(tar)], shardshuffle=False))) == 250
    (line,), error = problems(out, capsys)
    assert line.startswith(said) and f"{250 if how == 'cut' else 1} problem" in error


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("manifest.json", "is not finished, it has no manifest.json; run the same `make shards` again"),
        ("index.json", "is not finished, it has no index.json; run the same `make shards` again"),
    ],
)
def test_a_directory_without_its_listings_is_not_finished(shards: Shards, name: str, wrong: str) -> None:
    before = contents(shards.out)
    (shards.out / name).unlink()
    with pytest.raises(ValueError) as raised:
        verify_shards(shards.out)
    assert str(raised.value) == f"{shards.out} {wrong}"
    shards.make()
    assert contents(shards.out) == before


def test_damaged_listings_are_refused_and_made_again(shards: Shards) -> None:
    before = contents(shards.out)
    cut(shards.out / "index.json", -1)
    with pytest.raises(ValueError, match=r"index\.json is damaged \(.*\); delete it and run the same `make shards`"):
        verify_shards(shards.out)
    (shards.out / "index.json").write_bytes(before["index.json"])
    other = shards.tar.name, shards.tar.stem + ".json"
    for old, new, wrong, names in (
        (shards.tar.stem, "shard-000998", "manifest.json is damaged (they list different shards)", ["manifest.json"]),
        (shards.tar.name, "../../victim", "'../../victim' is no name of a shard", ["manifest.json"]),
        ('"settings"', '"setting"', "manifest.json is damaged (settings: Field required)", ["manifest.json"]),
    ):
        for name in other if old == shards.tar.stem else [old]:
            replace(shards.out / "manifest.json", name, name.replace(old, new))
        with pytest.raises(ValueError, match=f"{re.escape(wrong)}.*; delete (it|both) and run the same"):
            verify_shards(shards.out)
        for name in names:
            (shards.out / name).unlink()
        shards.make()
        assert contents(shards.out) == before


def test_listings_of_different_shards_are_refused(shards: Shards) -> None:
    """Both are whole: index.json is of other shards, and so says the manifest."""
    index = json.loads((shards.out / "index.json").read_text())
    (shards.out / "index.json").write_text(json.dumps(index | {"shards": index["shards"][1:]}))
    with_new_digests(lambda _: [])(shards)
    wrong = r"manifest\.json or index\.json is damaged \(they list different shards\); delete both and run the same"
    with pytest.raises(ValueError, match=wrong):
        verify_shards(shards.out)


def check_quickly(out: Path) -> list[str]:
    """Returns the files that `verify_shards` blames for listings alone, without reading a shard."""
    try:
        listings, damage = inspect_listings(out)
    except ValueError as error:
        return re.findall(r"[\w.-]+\.jsonl?", str(error).partition(" is damaged")[0])
    return [problem.file for problem in verify.check_listings(out, listings.manifest, damage)]


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "index.json", "rejects.jsonl"])
def test_one_flipped_bit_anywhere_in_a_listing_names_it(shards: Shards, name: str) -> None:
    """Every third byte, another bit each time; what names it is what `verify_shards` asks first."""
    assert check_quickly(shards.out) == []
    path = shards.out / name
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 3), *range(len(whole) - 80, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert name in check_quickly(shards.out), f"bit {place % 8} of byte {place}"


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "index.json", "rejects.jsonl"])
def test_readers_refuse_or_never_read_a_damaged_listing(shards: Shards, name: str) -> None:
    whole = (shards.out / name).read_bytes()
    for place in range(0, len(whole), 31):
        (shards.out / name).write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        if name in ("manifest.json", "index.json"):
            with pytest.raises(ValueError, match=rf"{name} is damaged .*run the same") as caught:
                read_listings(shards.out)
            assert "\n" not in str(caught.value)
        else:
            assert len(read_listings(shards.out).index.shards) > 1


def test_another_space_in_a_listing_fails_the_command_and_the_advice_repairs_it(shards: Shards, capsys) -> None:
    before = contents(shards.out)
    for name in ("manifest.json", "plan.json"):
        replace(shards.out / name, "\n ", "\n\t")
    lines, error = problems(shards.out, capsys)
    assert lines == [OWN, PLAN_DIFFERS] and "2 problems, 0 of" in error
    (shards.out / "plan.json").write_bytes(before["plan.json"])
    lines, error = problems(shards.out, capsys)
    assert lines == [OWN] and "1 problem, 0 of" in error
    check_advice(shards, before, lines)


def test_shards_without_checksums_of_listings_are_read_and_made_anew_by_the_advice(shards: Shards, capsys) -> None:
    """Version 1, as it was written before: one line says what to do, and no shard is written again."""
    before = contents(shards.out)
    manifest = json.loads(before["manifest.json"]) | {"version": 1}
    for name in ("identity_sha256", "index", "own_sha256"):
        del manifest[name]
    for shard in manifest["shards"]:
        del shard["sidecar_sha256"]
    (shards.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    plan = json.loads(before["plan.json"])
    del plan["own_sha256"]
    (shards.out / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    assert read_listings(shards.out).manifest.fingerprint == manifest["fingerprint"]
    lines, _ = problems(shards.out, capsys)
    assert lines == [f"manifest.json: {verify.OLD}"]
    check_advice(shards, before, lines)
    (shards.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    flip(shards.tar, shards.image_at)
    assert f"{shards.sample(1)} ({shards.source}): {DAMAGED}" in problems(shards.out, capsys)[0]


def test_thousands_of_problems_are_twenty_lines() -> None:
    many = [Problem("a.tar", f"sample {i}: {DAMAGED}") for i in range(998)] + [Problem("a.tar", "cut", 250)]
    short = shorten(many)
    assert len(short) == MAX_NAMED == 20 and short[:19] == many[:19]
    assert str(short[-1]) == "a.tar: and 1,229 more, the last: cut"
    assert sum(problem.count for problem in short) == 998 + 250
    assert shorten(many[:20]) == many[:20]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_bad_disk_is_damage_and_a_lost_one_is_an_error(tmp_path: Path, monkeypatch, code: int) -> None:
    class Broken(io.BytesIO):
        def read(self, *_) -> bytes:
            raise OSError(code, "broken")

    (tmp_path / "a.json").touch()
    monkeypatch.setattr(verify_shard, "open_file", lambda _: Broken())
    monkeypatch.setattr(verify_shard, "parse_sidecar", lambda *_: ([("1", 0, 9, 0)], None))
    numbers: dict[str, Any] = {"bytes": 10, "num_samples": 1, "num_images": 0, "num_rejected": 0}
    task = ReadTask(tmp_path, ShardEntry(tar="a.tar", sidecar="a.json", sha256="0" * 64, **numbers))
    if code == errno.EIO:
        found = verify_shard.verify_shard(task).problems
        assert found == [Problem("a.tar", "cannot be read: the disk reports an error")]
    else:
        with pytest.raises(OSError, match="broken"):
            verify_shard.verify_shard(task)


def test_a_shard_that_only_a_worker_misses_is_not_called_damaged(shards: Shards, monkeypatch) -> None:
    shards.tar.unlink()
    monkeypatch.setattr(verify, "file_sizes", lambda _: {shards.tar.name: 1})
    with pytest.raises(ValueError, match=f"a worker does not see .*{shards.tar.name}; every machine must see"):
        verify_shards(shards.out)


def test_exit_status(shards: Shards, tmp_path: Path) -> None:
    run_cli = partial(run_command, main)
    status, said = run_cli(shards.out, "--workers", 1)
    assert status == 0 and "every byte as it was written" in said
    status, said = run_cli(shards.out, "--workers", 0)
    assert status == 2 and "--workers 0 must be at least 1" in said
    status, said = run_cli(tmp_path / "none")
    assert status == 1 and "none: no shards here; name what `make shards` wrote" in said
    flip(shards.tar, shards.image_at)
    status, said = run_cli(shards.out)
    assert status == 1 and said.splitlines()[-1].startswith(f"error: {shards.out}: 1 problem, 1 of")


@pytest.mark.parametrize(
    ("data", "images", "num_samples"),
    [
        ("easy_vqa/llava_train.json", "easy_vqa", 1000),
        ("coco_photos/llava_instruct.json", "coco_photos/images", 39),
        ("coco_photos/llava_pretrain.json", "coco_photos/images", 39),
    ],
)
def test_real_data_passes(realdata: Path, tmp_path: Path, data: str, images: str, num_samples: int) -> None:
    made = make_shards(realdata / data, realdata / images, tmp_path / "out", Settings(shard_bytes=400_000))
    assert verify_shards(tmp_path / "out") == made
    assert made["num_samples"] == num_samples and made["num_shards"] > 3
