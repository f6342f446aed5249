"""Makes a small shard directory for energon to read: `python -m tests.energon_compat.make_shards OUT`."""

import json
import sys
from pathlib import Path

from PIL import Image

from data_prep.plan import Settings
from data_prep.shards import make_shards


def main(out: Path) -> None:
    """Writes rows with one image (JPEG and PNG), with two and with none, and their shards."""
    images, rows = out / "images", []
    images.mkdir(parents=True)
    for i in range(60):
        names = [f"{i}-{n}.{('jpg', 'png')[(i + n) % 2]}" for n in range((1, 1, 2, 0)[i % 4])]
        for name in names:
            Image.effect_noise((24, 24), 90).convert("RGB").save(images / name)
        turns = [{"from": "human", "value": "<image>" * len(names)}, {"from": "gpt", "value": f"caf\u00e9 {i}"}]
        rows.append({"id": str(i), "image": names, "conversations": turns})
    (out / "rows.json").write_text(json.dumps(rows))
    make_shards(out / "rows.json", images, out / "shards", Settings(shard_bytes=40_000))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
