"""Task files in lm_eval's form with their data beside them: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

DOCUMENTS = [
    {"text": f"def f{n}(x):\n    return x + {n}", "choices": [f" {n}", f" {n + 1} é€", " y"], "answer": n % 3}
    for n in range(7)
]
TASKS = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "def f(x):\n    return x +",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_fewshot": {
        "output_type": "multiple_choice",
        "num_fewshot": 4,
        "fewshot_split": "test",
        "doc_to_text": "{{text}} =",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}{{text}}{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "local_until": {
        "output_type": "generate_until",
        "doc_to_text": "def f(x): return x + {{answer}}\n",
        "doc_to_target": "x",
        "generation_kwargs": {"until": ["\n", "+"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, task in TASKS.items():
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "test_split": "test", **files, **task}))
    return folder
