"""Write two tasks for lm-evaluation-harness as local files, made from a held-out dataset of bytes.

    python examples/evaluation_task.py quickstart/data/heldout --out quickstart/tasks

The task heldout_continuation asks which of four pieces of text comes next. The task heldout_bits measures the bits per
byte of some passages. The same dataset always gives the same files. Run them with `--include_path quickstart/tasks`.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from prepare_bytes import END_OF_DOCUMENT, read_tokens

CONTEXT, CONTINUATION, PASSAGE = 64, 16, 600

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
CONTINUATION_TASK = """output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""
BITS_TASK = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}]
"""


def documents(prefix: Path) -> list[str]:
    """Return the documents of a dataset of prepare_bytes.py. A character that is cut off at an end is dropped."""
    tokens = read_tokens(prefix)
    ends = np.flatnonzero(tokens == END_OF_DOCUMENT)
    return [part[part < 256].astype(np.uint8).tobytes().decode(errors="ignore") for part in np.split(tokens, ends)]


def piece(texts: list[str], length: int, choice: random.Random) -> str:
    """Return `length` characters from a random place of a random text."""
    text = choice.choice(texts)
    start = choice.randrange(len(text) - length + 1)
    return text[start : start + length]


def continuation_item(texts: list[str], choice: random.Random) -> dict:
    """Return a context, four choices, and the index of the choice that follows the context in the text."""
    text = piece(texts, CONTEXT + CONTINUATION, choice)
    right = text[CONTEXT:]
    choices = [right, *(piece(texts, CONTINUATION, choice) for _ in range(3))]
    choice.shuffle(choices)
    return {"context": text[:CONTEXT], "choices": choices, "answer": choices.index(right)}


def write(prefix: Path, out: Path, count: int, passages: int):
    """Write both tasks to `out`, each as a YAML file and a JSONL file.

    Raises:
        ValueError: no document of the dataset is long enough.
    """
    texts = [text for text in documents(prefix) if len(text) >= PASSAGE]
    if not texts:
        raise ValueError(f"{prefix} has no document of {PASSAGE} characters: give a dataset with longer documents")
    out.mkdir(parents=True, exist_ok=True)
    choice = random.Random(0)
    items = {
        "heldout_continuation": (CONTINUATION_TASK, [continuation_item(texts, choice) for _ in range(count)]),
        "heldout_bits": (BITS_TASK, [{"text": piece(texts, PASSAGE, choice)} for _ in range(passages)]),
    }
    for name, (task, lines) in items.items():
        file = out / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (out / f"{name}.yaml").write_text(TASK.format(name=name, file=json.dumps(str(file.resolve()))) + task)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="path of a dataset of prepare_bytes.py, without .bin and .idx")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the tasks to")
    parser.add_argument("--items", type=int, default=50, help="number of items of heldout_continuation")
    parser.add_argument("--passages", type=int, default=5, help="number of passages of heldout_bits")
    args = parser.parse_args()
    try:
        write(args.dataset, args.out, args.items, args.passages)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
