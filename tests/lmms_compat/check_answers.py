"""Are lmms-eval's answers ours? `python -m tests.lmms_compat.check_answers OUT/expected.json RESULTS`

RESULTS is a folder that lmms-eval wrote with `--log_samples`.
"""

import json
import sys
from pathlib import Path


def main(expected: Path, results: Path) -> None:
    """Compares every answer, and the score.

    Raises:
        AssertionError: one differs, or there is not exactly one file of samples and one of results.
    """
    ours = json.loads(expected.read_text())
    [samples], [scores] = results.rglob("*_samples_*.jsonl"), results.rglob("*_results.json")
    rows = sorted(map(json.loads, samples.read_text().split("\n")[:-1]), key=lambda row: row["doc_id"])
    theirs = [row["filtered_resps"].strip() for row in rows]
    assert theirs == ours["answers"], f"lmms-eval's answers {theirs} are not ours, {ours['answers']}"
    accuracy = json.loads(scores.read_text())["results"]["saisa_local"]["accuracy,none"]
    assert abs(accuracy - ours["accuracy"]) < 1e-9, f"lmms-eval's accuracy {accuracy} is not {ours['accuracy']}"
    print(f"{results.name}: {len(theirs)} answers of lmms-eval are ours, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
