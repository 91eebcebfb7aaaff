"""Data sets of a few rows in the layout that the shipped tasks read, and what a model answers to them, worked out by hand."""

import json
from pathlib import Path

ROWS = {
    "arc_easy/test.jsonl": [
        {"question": f"Where is the {a}?", "choices": {"text": ["lake", "moon", "wall"], "label": ["1", "2", "3"]},
         "answerKey": key}
        for a, key in (("fox", "1"), ("ship", "3"), ("king", "2"), ("horse", "1"))
    ],
    "arc_easy/validation.jsonl": [
        {"question": "Who spoke?", "choices": {"text": ["nobody", "the fox"], "label": ["A", "B"]}, "answerKey": "A"}
    ],
    "arc_challenge/test.jsonl": [
        {"question": "Where?", "choices": {"text": ["near", "away"], "label": ["A", "B"]}, "answerKey": "B"},
    ],
    "arc_challenge/validation.jsonl": [
        {"question": "Who?", "choices": {"text": ["king", "fox"], "label": ["A", "B"]}, "answerKey": "B"},
    ],
    "blimp/wh_vs_that_no_gap.jsonl": [
        {"sentence_good": "The king saw the fox.", "sentence_bad": "The king fox saw the."},
        {"sentence_good": "Nobody spoke.", "sentence_bad": "Nobody spokes."},
    ],
    "blimp/tough.jsonl": [
        {"sentence_good": "The girl saw it.", "sentence_bad": "The girl see it."},
        {"sentence_good": "It was near.", "sentence_bad": "It were near."},
    ],
    "boolq/validation.jsonl": [
        {"passage": "The fox is near the lake.", "question": "is the fox near", "answer": True},
        {"passage": "The ship is away.", "question": "is the ship near", "answer": False},
    ],
    "gsm8k/test.jsonl": [{"question": "2 and 2?", "answer": "2+2=4\n#### 4"}],
    "gsm8k/train_first.jsonl": [{"question": f"{n} and 1?", "answer": f"#### {n + 1}"} for n in range(6)],
    "hellaswag/validation_1000.jsonl": [
        {"activity_label": "Sea", "ctx": "The  ship", "endings": ["sails.", " spoke.", "a [x] wall."], "label": "0"},
        {"activity_label": "Land", "ctx": "The horse", "endings": ["near.", "the.", "was."], "label": "2"},
    ],
    "lambada_openai/test.jsonl": [{"text": "The king saw the fox near the lake"}, {"text": "The girl saw the ship"}],
    "mmlu/test/astronomy.jsonl": [
        {"question": " Which is far? ", "subject": "astronomy", "choices": ["moon", "lake", "wall", "fox"], "answer": 0},
    ],
    "mmlu/test/us_foreign_policy.jsonl": [
        {"question": "Who?", "subject": "us_foreign_policy", "choices": ["a", "b", "c", "d"], "answer": 1},
        {"question": "Where?", "subject": "us_foreign_policy", "choices": ["a", "b", "c", "d"], "answer": 3},
    ],
    "mmlu/dev/astronomy.jsonl": [{"question": "Far?", "subject": "astronomy", "choices": ["1", "2", "3", "4"], "answer": 2}],
    "mmlu/dev/us_foreign_policy.jsonl": [
        {"question": "Near?", "subject": "us_foreign_policy", "choices": ["1", "2", "3", "4"], "answer": 2}
    ],
    "openbookqa/validation.jsonl": [
        {"question_stem": "A fox is", "choices": {"text": ["near", "away"], "label": ["A", "B"]}, "answerKey": "B"},
    ],
    "piqa/validation.jsonl": [{"goal": "See the moon", "sol1": "at night", "sol2": "at noon", "label": 0}],
    "tinystories_cloze/dev.jsonl": [
        {"context": "The king saw the fox.", "choices": ["It was near.", "Nobody spoke.", "A wall.", "No."], "label": 1}
    ],
    "winogrande/validation.jsonl": [
        {"sentence": "The fox saw the king, so the _ was away.", "option1": "fox", "option2": "king", "answer": "2"},
    ],
}  # fmt: skip


def write_sets(folder: Path) -> Path:
    """Write all of them below `folder` and return it."""
    for name, rows in ROWS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
