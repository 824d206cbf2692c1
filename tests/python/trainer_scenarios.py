"""Run by test_hf_trainer.py under `bitfall run`: Hugging Face's Trainer in ZeRO stages 0, 1, 2.

Each scenario trains to the end, and once more from the checkpoint in the middle. Rank 0 leaves
model files in OUTPUT/NAME and OUTPUT/NAME_resumed, and what it saw in OUTPUT/results.json.

usage: trainer_scenarios.py MODEL TRAIN_CSV DEV_CSV CONFIG OUTPUT
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

STEPS = 40
# Name -> ZeRO stage and dropout. Masks are the native encoder's own, and it does not run in every
# stage: what is compared between stages goes without dropout.
SCENARIOS = {"dropout": (0, 0.1), "stage0": (0, 0.0), "stage1": (1, 0.0), "stage2": (2, 0.0)}
MODEL, TRAIN, DEV, CONFIG, OUTPUT = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(MODEL)


def rows(path: str) -> list[dict[str, Any]]:
    with Path(path).open(newline="") as file:
        return [
            dict(tokenizer(row["text"])) | {"label": int(row["label"] == "yes")}
            for row in csv.DictReader(file)
        ]


def accuracy(outcome: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((outcome.predictions.argmax(-1) == outcome.label_ids).mean())}


class BitTrace(TrainerCallback):
    """The bits of every state after each step, as the engine reports them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []

    def on_step_end(self, _arguments: Any, _state: Any, _control: Any, **_: Any) -> None:
        self.steps.append(self.trainer.model_wrapped.last_result["bits"])


def make_trainer(stage: int, dropout: float, output_dir: Path) -> Trainer:
    config = json.loads(Path(CONFIG).read_text()) | {"zero_optimization": {"stage": stage}}
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        deepspeed=config,
        use_cpu=True,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        max_grad_norm=0.5,
        max_steps=STEPS,
        logging_steps=1,
        save_steps=STEPS // 2,
        disable_tqdm=True,
        report_to="none",
    )
    set_seed(1)
    return Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            MODEL, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
        ),
        args=arguments,
        train_dataset=rows(TRAIN),
        eval_dataset=rows(DEV),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )


def history(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def scenario(name: str, stage: int, dropout: float) -> dict[str, Any]:
    whole_dir, resumed_dir = Path(OUTPUT, name), Path(OUTPUT, f"{name}_resumed")
    whole = make_trainer(stage, dropout, whole_dir)
    trace = BitTrace()
    trace.trainer = whole
    whole.add_callback(trace)
    whole.train()
    whole.save_model()
    evaluated = whole.evaluate()
    predictions = whole.predict(whole.eval_dataset)
    whole.accelerator.free_memory()

    resumed = make_trainer(stage, dropout, resumed_dir)
    resumed.train(resume_from_checkpoint=str(whole_dir / f"checkpoint-{STEPS // 2}"))
    resumed.save_model()
    resumed.accelerator.free_memory()
    return {
        "world_size": whole.accelerator.num_processes,
        "loss": history(whole, "loss"),
        "grad_norm": history(whole, "grad_norm"),
        "bits": trace.steps,
        "learning_rate": history(whole, "learning_rate"),
        "resumed_loss": history(resumed, "loss"),
        "accuracy": evaluated["eval_accuracy"],
        "eval_loss": evaluated["eval_loss"],
        "predicted_accuracy": predictions.metrics["test_accuracy"],
        "logits_shape": list(np.shape(predictions.predictions)),
    }


results = {name: scenario(name, *settings) for name, settings in SCENARIOS.items()}
Path(OUTPUT, "results.json").write_text(json.dumps(results))
