"""Makes an export and a task of lmms-eval for it: `python -m tests.lmms_compat.make_task OUT`.

OUT/export             a tiny random export, in bfloat16, as which lmms-eval loads every model
OUT/task/              questions about images, about none, and how lmms-eval reads and scores them
OUT/expected.json      the answers of `pipeline.evaluation.evaluate`, and the score that follows from them
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.evaluation.evaluate import evaluate
from tests.hf_compat.make_folder import make_export

MAX_NEW_TOKENS = 8
QUESTIONS = [
    "What is the colour of the square?",
    "How many shapes are there?",
    "What is on the left, and what is below the blue circle on the right?",
    "Is there a circle?",
]
TASK = """\
task: saisa_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {max_new_tokens}
process_results: !function utils.process_results
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
metadata:
  version: 0
"""
UTILS = """\
from pathlib import Path

from PIL import Image


def doc_to_visual(doc):
    return [Image.open(Path(__file__).parent / name) for name in doc["images"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"accuracy": float(results[0].strip() == doc["answer"])}
"""


def main(out: Path) -> None:
    """Writes the folders and the file above."""
    task = out / "task"
    task.mkdir(parents=True)
    make_export(out / "work", out / "export", "llama", "clip", "mlp", dtype=torch.bfloat16)
    rows = []
    for number in range(12):
        images = [] if number % 4 == 3 else [f"{number}.png"]
        for name in images:
            noise = np.random.default_rng(number).integers(0, 256, (20 + 5 * number, 40, 3), np.uint8)
            Image.fromarray(noise).save(task / name)
        question = QUESTIONS[number % 3] if images else QUESTIONS[3]
        turns = [{"from": "human", "value": "<image>\n" * len(images) + question}, {"from": "gpt", "value": "?"}]
        rows.append({"id": str(number), "image": images, "conversations": turns})
    (out / "rows.json").write_text(json.dumps(rows))
    result = evaluate(out / "export", out / "rows.json", task, max_new_tokens=MAX_NEW_TOKENS)
    answers = [answer.text for answer in result.answers]
    # Two of three are asked for what the model says, so that the score is neither 0 nor 1.
    wanted = [answer if number % 3 else "something else" for number, answer in enumerate(answers)]
    docs = [
        {"images": answer.question.images, "question": answer.question.text, "answer": text}
        for answer, text in zip(result.answers, wanted, strict=True)
    ]
    (task / "questions.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    settings = {"questions": task.resolve() / "questions.jsonl", "max_new_tokens": MAX_NEW_TOKENS}
    (task / "saisa_local.yaml").write_text(TASK.format(**settings))
    (task / "utils.py").write_text(UTILS)
    accuracy = sum(found == text for found, text in zip(answers, wanted, strict=True)) / len(answers)
    (out / "expected.json").write_text(json.dumps({"answers": answers, "accuracy": accuracy}))
    print(f"{len(set(answers))} different answers to {len(answers)} questions")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
