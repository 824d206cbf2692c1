"""Worker: the same training step with the Hugging Face model in PyTorch."""

import argparse
import time

import torch
from protocol import resident_bytes, serve
from transformers import BertForSequenceClassification

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
parser.add_argument("--mode", choices=["eager", "compiled"], default="eager")
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()

torch.set_num_threads(args.threads)
torch.manual_seed(0)
base_bytes = resident_bytes()
model = BertForSequenceClassification.from_pretrained(
    args.model, num_labels=2, attn_implementation="sdpa", dtype=torch.float32
).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.01, fused=True)
forward = torch.compile(model) if args.mode == "compiled" else model
autocast = torch.autocast("cpu", torch.bfloat16, args.dtype == "bf16")
input_ids = torch.randint(1000, 30000, (args.batch, args.length))
attention_mask = torch.ones_like(input_ids)
labels = torch.randint(0, 2, (args.batch,))


def step() -> dict[str, float]:
    begin = time.perf_counter()
    with autocast:
        loss = forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()
    return {"seconds": time.perf_counter() - begin, "base_bytes": base_bytes}


for _ in range(3):
    step()
serve(step)
