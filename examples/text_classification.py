"""Fine-tunes a BERT classifier with Hugging Face's Trainer, as many scripts do.

Nothing in it is about bitfall. Its csv files have the columns label and text, or label, sentence1
and sentence2.

    python text_classification.py --model_name_or_path MODEL --train_file train.csv ...
    bitfall run text_classification.py ... --deepspeed test.json
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class ScriptArguments:
    model_name_or_path: str
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    max_seq_length: int = 128
    pad_to_max_length: bool = False
    max_train_samples: int | None = None


def read(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    arguments: ScriptArguments,
    labels: list[str],
) -> list[dict]:
    """Tokenized rows with the index of their label; new labels are appended to `labels`."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in rows[0] if name != "label"]
    encoded = tokenizer(
        *([row[name] for row in rows] for name in columns),
        truncation=True,
        max_length=arguments.max_seq_length,
        padding="max_length" if arguments.pad_to_max_length else False,
    )
    labels.extend(sorted({row["label"] for row in rows} - set(labels)))
    return [
        {name: encoded[name][index] for name in encoded} | {"label": labels.index(row["label"])}
        for index, row in enumerate(rows)
    ]


def accuracy(predictions: EvalPrediction) -> dict[str, float]:
    chosen = np.argmax(predictions.predictions, axis=-1)
    return {"accuracy": float((chosen == predictions.label_ids).mean())}


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    arguments, training = parser.parse_args_into_dataclasses()
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    labels: list[str] = []
    files = {
        "train": arguments.train_file,
        "validation": arguments.validation_file,
        "test": arguments.test_file,
    }
    data = {name: read(path, tokenizer, arguments, labels) for name, path in files.items() if path}
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model_name_or_path, num_labels=len(labels)
    )
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=data.get("train", [])[: arguments.max_train_samples] or None,
        eval_dataset=data.get("validation"),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    if training.do_train:
        result = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training.do_predict:
        predictions = trainer.predict(data["test"], metric_key_prefix="predict").predictions
        if trainer.is_world_process_zero():
            lines = [labels[index] for index in np.argmax(predictions, axis=-1)]
            Path(training.output_dir, "predictions.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
