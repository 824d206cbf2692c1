"""One whole MRPC run in PyTorch, from tokenization to metric, as a plain fine-tuning loop does it.

Prints one JSON line: seconds without imports and model loading, and the metrics.
"""

import argparse
import csv
import json
import time
from pathlib import Path

import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    get_linear_schedule_with_warmup,
)

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data_dir", type=Path, required=True)
parser.add_argument("--padding", choices=["max_length", "longest"], required=True)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--max_train_samples", type=int, default=None)
args = parser.parse_args()

torch.set_num_threads(2)
torch.manual_seed(42)
model = BertForSequenceClassification.from_pretrained(args.model, num_labels=2, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(args.model)
begin = time.perf_counter()


def examples(name: str) -> list[tuple[str, str, int]]:
    with (args.data_dir / name).open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return [(row[3], row[4], int(row[0])) for row in rows]


def batches(
    rows: list[tuple[str, str, int]], size: int, order: list[int]
) -> list[dict[str, torch.Tensor]]:
    encoded = tokenizer(
        [row[0] for row in rows], [row[1] for row in rows], truncation=True, max_length=128
    )
    result = []
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batch = tokenizer.pad(
            {key: [encoded[key][index] for index in chosen] for key in encoded},
            padding=args.padding,
            max_length=128,
            return_tensors="pt",
        )
        batch["labels"] = torch.tensor([rows[index][2] for index in chosen])
        result.append(dict(batch))
    return result


train, dev = examples("train.tsv")[: args.max_train_samples], examples("dev.tsv")
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
steps = args.epochs * -(-len(train) // 32)
schedule = get_linear_schedule_with_warmup(optimizer, 2, steps)
model.train()
for _ in range(args.epochs):
    for batch in batches(train, 32, torch.randperm(len(train)).tolist()):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
model.eval()
predictions: list[int] = []
with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
    for batch in batches(dev, 8, list(range(len(dev)))):
        predictions += model(**batch).logits.argmax(-1).tolist()
labels = [row[2] for row in dev]
print(
    json.dumps(
        {
            "seconds": time.perf_counter() - begin,
            "steps": steps,
            "accuracy": accuracy_score(labels, predictions),
            "f1": f1_score(labels, predictions),
        }
    )
)
