"""Run by test_hf_trainer.py under `bitfall run`: Hugging Face's Trainer with several configs.

Each scenario trains to the end, and once more from the checkpoint in the middle. Rank 0 leaves
model files in OUTPUT/NAME and OUTPUT/NAME_resumed, and what it saw in OUTPUT/results.json.

usage: trainer_scenarios.py MODEL TRAIN_CSV DEV_CSV CONFIG OUTPUT NAME...
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

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


class Scenario(NamedTuple):
    """What differs from the config in the file. Masks of dropout are the native encoder's own: what
    is compared between scenarios goes without."""

    sections: dict[str, Any]  # of the config
    eigenvalues: bool = False
    fp16: bool = False
    dropout: float = 0.0


SCENARIOS = {
    "dropout": Scenario({}, dropout=0.1),
    "stage0": Scenario({}),
    "stage1": Scenario({"zero_optimization": {"stage": 1}}),
    "stage2": Scenario({"zero_optimization": {"stage": 2}}),
    "eigenvalues": Scenario({}, eigenvalues=True),
    "eigenvalues_torch": Scenario({"bitfall": {"native_encoder": False}}, eigenvalues=True),
    "fp16": Scenario(  # at the first steps gradients overflow
        {
            "fp16": {
                "enabled": "auto",
                "initial_scale_power": 22,
                "loss_scale_window": 20,
                "hysteresis": 1,
            }
        },
        fp16=True,
    ),
}
MODEL, TRAIN, DEV, CONFIG, OUTPUT = sys.argv[1:6]
tokenizer = AutoTokenizer.from_pretrained(MODEL)


def rows(path: str) -> list[dict[str, Any]]:
    with Path(path).open(newline="") as file:
        return [
            dict(tokenizer(row["text"])) | {"label": int(row["label"] == "yes")}
            for row in csv.DictReader(file)
        ]


def accuracy(outcome: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((outcome.predictions.argmax(-1) == outcome.label_ids).mean())}


class Trace(TrainerCallback):
    """What the engine reports of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_step_end(self, _arguments: Any, _state: Any, _control: Any, **_: Any) -> None:
        self.steps.append(self.trainer.model_wrapped.last_result)

    def of(self, key: str) -> list[Any]:
        return [step[key] for step in self.steps]


def config_of(scenario: Scenario) -> dict[str, Any]:
    config = json.loads(Path(CONFIG).read_text())
    if scenario.eigenvalues:
        config["quantize_training"]["eigenvalue"] = {"enabled": True, "max_iter": 20}
    return config | {"zero_optimization": {"stage": 0}} | scenario.sections


def make_trainer(scenario: Scenario, output_dir: Path) -> Trainer:
    config = config_of(scenario)
    arguments = TrainingArguments(
        fp16=scenario.fp16,
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
            MODEL,
            hidden_dropout_prob=scenario.dropout,
            attention_probs_dropout_prob=scenario.dropout,
        ),
        args=arguments,
        train_dataset=rows(TRAIN),
        eval_dataset=rows(DEV),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )


def history(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def run(name: str, scenario: Scenario) -> dict[str, Any]:
    whole_dir, resumed_dir = Path(OUTPUT, name), Path(OUTPUT, f"{name}_resumed")
    whole = make_trainer(scenario, whole_dir)
    trace = Trace()
    trace.trainer = whole
    whole.add_callback(trace)
    whole.train()
    whole.save_model()
    evaluated = whole.evaluate()
    predictions = whole.predict(whole.eval_dataset)
    whole.accelerator.free_memory()

    resumed = make_trainer(scenario, resumed_dir)
    resumed.train(resume_from_checkpoint=str(whole_dir / f"checkpoint-{STEPS // 2}"))
    resumed.save_model()
    resumed.accelerator.free_memory()
    return {
        "world_size": whole.accelerator.num_processes,
        "loss": history(whole, "loss"),
        "grad_norm": history(whole, "grad_norm"),
        **{key: trace.of(key) for key in ("bits", "eigenvalues", "skipped", "loss_scale")},
        "learning_rate": history(whole, "learning_rate"),
        "resumed_loss": history(resumed, "loss"),
        "accuracy": evaluated["eval_accuracy"],
        "eval_loss": evaluated["eval_loss"],
        "predicted_accuracy": predictions.metrics["test_accuracy"],
        "logits_shape": list(np.shape(predictions.predictions)),
    }


results = {name: run(name, SCENARIOS[name]) for name in sys.argv[6:]}
Path(OUTPUT, "results.json").write_text(json.dumps(results))
