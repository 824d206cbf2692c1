"""Worker: Hugging Face's Trainer on MRPC, padded to 128, batch 32, bf16, with or without bitfall.

Answers each input line with the seconds that the next --steps optimizer steps take, data included.
"""

import argparse
import csv
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

WARM_UP_STEPS = 3
parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data_dir", type=Path, required=True)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--deepspeed", help="config, under bitfall run")
args = parser.parse_args()


def examples() -> list[dict[str, list[int] | int]]:
    with (args.data_dir / "train.tsv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    encoded = AutoTokenizer.from_pretrained(args.model)(
        [row[3] for row in rows],
        [row[4] for row in rows],
        truncation=True,
        max_length=128,
        padding="max_length",
    )
    return [
        {name: encoded[name][index] for name in encoded} | {"labels": int(row[0])}
        for index, row in enumerate(rows)
    ]


class Measure(TrainerCallback):
    """Stops for an input line after every --steps steps; the end of the input ends the training."""

    def __init__(self) -> None:
        self.begin = 0.0

    def on_step_end(self, _arguments, state, control, **_):
        measured = state.global_step - WARM_UP_STEPS
        if measured < 0 or measured % args.steps != 0:
            return
        ready = {"ready": True} if measured == 0 else {"seconds": time.perf_counter() - self.begin}
        print(json.dumps(ready), flush=True)
        control.should_training_stop = not sys.stdin.readline()
        self.begin = time.perf_counter()


torch.set_num_threads(2)
with tempfile.TemporaryDirectory() as folder:
    training = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=32,
        learning_rate=2e-5,
        max_steps=100_000,
        bf16=True,
        use_cpu=True,
        deepspeed=args.deepspeed,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
    )
    model = BertForSequenceClassification.from_pretrained(args.model, dtype=torch.float32)
    trainer = Trainer(model, training, train_dataset=examples(), callbacks=[Measure()])
    trainer.train()
