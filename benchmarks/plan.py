"""The plan of a whole epoch of 665,298 samples: time, memory, padding, imbalance, and a cold start at any step.

    python -m benchmarks.plan

Nothing is read; the plan comes from a length table. Its lengths imitate llava_v1_5_mix665k: 6% of the rows have no
image and are long conversations (ShareGPT); of the others half are short answers in many turns (VQA) and half long
descriptions and conversations (LLaVA-Instruct). Each kind is log-normal, cut to 2,048 positions.
"""

import json
import resource
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from common.console import build_console, run
from pipeline.config import RunConfig, load_config
from pipeline.data.lengths import LengthTable
from pipeline.data.order import Source
from pipeline.data.schedule import Schedule

NUM_SAMPLES, NUM_SHARDS, NUM_RANKS, ROW_MULTIPLE = 665_298, 666, 8, 16
KINDS = {  # fraction of the rows, median text tokens, sigma of the logarithm, images
    "text only": (0.06, 900.0, 0.7, 0),
    "short answers": (0.47, 220.0, 0.6, 1),
    "descriptions": (0.47, 330.0, 0.5, 1),
}
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "saisa-vicuna-7b-stage2.yaml"


def lengths(num_samples: int, num_tokens_per_image: int, max_positions: int) -> LengthTable:
    """Returns a length table of `KINDS`, in random order."""
    generator = np.random.default_rng(0)
    kinds = np.array(list(KINDS.values()))
    _, median, sigma, images = kinds[generator.choice(len(kinds), num_samples, p=kinds[:, 0])].T
    text = generator.lognormal(np.log(median), sigma)
    text = np.clip(text, 20, max_positions - images * num_tokens_per_image)
    values = np.stack([text, images, text * 0.6, images, 0 * text], axis=1)
    return LengthTable(values.astype(np.int32), {})


def plan_epoch(schedule: Schedule) -> dict[str, float]:
    """Returns what planning every step of an epoch takes and gives."""
    started = time.perf_counter()
    counts = [schedule.plan(step).counts for step in range(schedule.num_steps)]
    seconds = time.perf_counter() - started
    text, padding = (sum(getattr(c, f"num_{name}_tokens") for c in counts) for name in ("text", "padding"))
    imbalances = [c.imbalance_fraction for c in counts]
    return {
        "steps": schedule.num_steps,
        "seconds": seconds,
        "padding_fraction": padding / (text + padding),
        "imbalance_mean_fraction": float(np.mean(imbalances)),
        "imbalance_p99_fraction": float(np.quantile(imbalances, 0.99)),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def cold_start(config: RunConfig, sources: list[Source], table: LengthTable, step: int) -> float:
    """Returns the seconds until a new process would know the packs of `step`."""
    started = time.perf_counter()
    Schedule(config, sources, table, NUM_RANKS).plan(step)
    return time.perf_counter() - started


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="write the numbers here too")] = None,
) -> None:
    """Measure the plan of an epoch."""
    changes = ["train.num_epochs=40", "train.global_batch_size=128", f"data.row_multiple={ROW_MULTIPLE}"]
    config = load_config(CONFIG, changes)
    table = lengths(NUM_SAMPLES, config.model.num_tokens_per_image, config.data.max_positions)
    sources = [Source(tuple(len(part) for part in np.array_split(np.arange(NUM_SAMPLES), NUM_SHARDS)))]
    one_epoch = load_config(CONFIG, [*changes, "train.num_epochs=1"])
    found = plan_epoch(Schedule(one_epoch, sources, table, NUM_RANKS))
    starts = {step: sorted(cold_start(config, sources, table, step) for _ in range(5))[2] for step in (0, 100_000)}
    found |= {f"cold_start_at_{step}_seconds": seconds for step, seconds in starts.items()}
    shown = Table("665,298 samples, batches of 128 on 8 ranks", "")
    for name, value in found.items():
        shown.add_row(name.replace("_", " "), f"{value:.2%}" if name.endswith("fraction") else f"{value:,.3f}")
    build_console().print(shown)
    if json_file:
        json_file.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    run(main)
