"""`bitfall glue`: the command's flags and its entry; the run itself is in fine_tune.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitfall import arguments

if TYPE_CHECKING:
    import argparse

EXAMPLES = """The flags are those of Hugging Face's run_glue.py, with the same meaning and defaults.

examples:
  train and evaluate on MRPC with the MoQ settings of test.json
    bitfall glue --model_name_or_path bert-base-cased --task_name mrpc --data_dir glue \\
        --do_train --do_eval --max_seq_length 128 --per_device_train_batch_size 32 \\
        --learning_rate 2e-5 --num_train_epochs 3 --output_dir out/mrpc --fp16 \\
        --deepspeed test.json
  go on after an interruption: the same command and
    --resume_from_checkpoint true
  own data: columns sentence1, sentence2 (or the first two) and label
    bitfall glue --model_name_or_path MODEL --train_file train.csv --validation_file dev.csv \\
        --do_train --do_eval --output_dir out/own
  two processes
    mpirun -np 2 bitfall glue ...

Without --data_dir, GLUE data is looked for in $BITFALL_GLUE_DIR, and without that on the hub.
In --output_dir: model.safetensors (quantized), master/ (f32 weights), quantized.safetensors
(integers), all_results.json, trainer_state.json, bitfall_log.jsonl, report.html, checkpoint-*/."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags and examples to the parser of the subcommand."""
    parser.epilog = EXAMPLES
    arguments.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Runs one fine-tuning. Returns 0, or 130 after an interruption with a checkpoint."""
    parsed = arguments.from_namespace(args)
    from bitfall.fine_tune import fine_tune  # loads numpy, the tokenizer and the engine

    return fine_tune(parsed)
