"""One whole MRPC run of `bitfall glue` with the tutorial's flags, files and report included."""

import argparse
import json
import tempfile
import time
from pathlib import Path

from bitfall import cli

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data_dir", type=Path, required=True)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--max_train_samples", type=int, default=None)
args = parser.parse_args()

config = {
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 2e-5, "weight_decay": 0.0, "bias_correction": True},
    },
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "quantize_training": {
        "enabled": True,
        "quantize_bits": {"start_bits": 16, "target_bits": 8},
        "quantize_schedule": {"quantize_period": 400, "schedule_offset": 0},
        "quantize_groups": 8,
    },
}
with tempfile.TemporaryDirectory() as folder:
    output = Path(folder) / "mrpc"
    (Path(folder) / "test.json").write_text(json.dumps(config))
    flags = (
        f"glue --model_name_or_path {args.model} --task_name mrpc --data_dir {args.data_dir} "
        "--do_train --do_eval "
        "--max_seq_length 128 --per_device_train_batch_size 32 --learning_rate 2e-5 "
        f"--num_train_epochs {args.epochs} --output_dir {output} --bf16 --warmup_steps 2 "
        f"--deepspeed {folder}/test.json"
    ).split()
    if args.max_train_samples is not None:
        flags += ["--max_train_samples", str(args.max_train_samples)]
    begin = time.perf_counter()
    code = cli.main(flags)
    seconds = time.perf_counter() - begin
    metrics = json.loads((output / "all_results.json").read_text())
print(
    json.dumps(
        {
            "seconds": seconds,
            "exit_code": code,
            "accuracy": metrics["eval_accuracy"],
            "f1": metrics["eval_f1"],
        }
    )
)
