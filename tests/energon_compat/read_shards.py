"""Reads a shard directory with megatron-energon, in an environment of its own: `make test-energon`.

    python read_shards.py SHARDS

The shards are prepared by energon's own command and read to the end by its loader; every record and every image must
be there once, byte for byte as in the tars.
"""

import subprocess
import sys
import tarfile
from pathlib import Path

from megatron.energon import (  # type: ignore[reportMissingImports] (an environment of its own)
    Cooker,
    CrudeSample,
    DefaultTaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    get_loader,
    get_val_dataset,
    stateless,
)

DATASET = "__module__: megatron.energon\n__class__: CrudeWebdataset\nauto_decode: false\n"


@stateless
def cook(sample: CrudeSample) -> dict:
    """Returns the sample unchanged."""
    return {**basic_sample_keys(sample), **sample}


class Unchanged(DefaultTaskEncoder):
    """Hands every sample out as the tar holds it."""

    cookers = (Cooker(cook),)

    def batch(self, samples: list) -> list:
        """Returns the samples of a batch as a list."""
        return samples


def prepare(folder: Path) -> None:
    """Runs `energon prepare` with all shards in the validation split, which is read once and in order."""
    answers = "0,1,0\nn\n"
    subprocess.run([Path(sys.executable).with_name("energon"), "prepare", folder], input=answers, text=True, check=True)
    (folder / ".nv-meta" / "dataset.yaml").write_text(DATASET)


def read(folder: Path) -> dict[str, dict[str, bytes]]:
    """Returns the members of each sample by key, as energon's loader gives them."""
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_val_dataset(folder, worker_config=config, batch_size=1, task_encoder=Unchanged())
    found: dict[str, dict[str, bytes]] = {}
    for batch in get_loader(dataset):
        for sample in batch:
            key = sample["__key__"].rpartition("/")[2]
            assert key not in found, f"energon gave {key} twice"
            found[key] = {name: data for name, data in sample.items() if not name.startswith("__")}
    return found


def expected(folder: Path) -> dict[str, dict[str, bytes]]:
    """Returns the same as a plain tar reader gives it."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                file = tar.extractfile(member)
                assert file
                samples.setdefault(key, {})[name] = file.read()
    return samples


if __name__ == "__main__":
    shards = Path(sys.argv[1])
    prepare(shards)
    samples = read(shards)
    assert samples == expected(shards), "energon reads other samples than a tar reader"
    print(f"megatron-energon reads all {len(samples)} samples of {shards}")
