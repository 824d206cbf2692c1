"""Writes the golden files that the C++ tests compare with: PyTorch's numbers for BERT models.

    python make_goldens.py tiny                 tiny_*.safetensors, tiny_*.json
    python make_goldens.py minilm MODEL_DIR     minilm.safetensors

Needs torch, transformers and safetensors. The models are transformers' own; sequences are padded
for them and packed (padding removed) in the files: these also prove that packing changes nothing.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

HERE = Path(__file__).parent
Arrays = dict[str, npt.NDArray[np.generic]]

# name -> (head, num_labels, hidden_act, layers); every head and every activation at least once.
TINY_CASES = {
    "classification_gelu": ("classification", 3, "gelu", 2),
    "classification_relu": ("classification", 2, "relu", 1),
    "regression_gelu_new": ("regression", 1, "gelu_new", 2),
    "span_tanh": ("span", 2, "tanh", 2),
}
LENGTHS = [5, 1, 12, 7]
SAMPLES_PER_GRADIENT = 300


def make_batch(lengths: list[int], vocab_size: int, seed: int) -> dict[str, torch.Tensor]:
    """Padded input_ids, token_type_ids and attention_mask [B, S] of random sentence pairs."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    mask = torch.zeros(shape, dtype=torch.long)
    types = torch.zeros(shape, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        types[row, length // 2 : length] = 1
    ids = torch.randint(1, vocab_size, shape, generator=generator) * mask
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}


def make_labels(head: str, num_labels: int, lengths: list[int]) -> torch.Tensor:
    count = len(lengths)
    if head == "classification":
        return torch.arange(count) % num_labels
    if head == "regression":
        return torch.linspace(-1.0, 2.0, count)
    return torch.tensor([[length // 3, length - 1] for length in lengths])


def pack(padded: torch.Tensor, mask: torch.Tensor) -> npt.NDArray[np.generic]:
    return padded[mask.bool()].numpy()


def run(
    model: torch.nn.Module, head: str, batch: dict[str, torch.Tensor], labels: torch.Tensor
) -> Arrays:
    """The packed batch, logits and loss; the gradients are left in the model."""
    mask = batch["attention_mask"]
    if head == "span":
        output = model(**batch, start_positions=labels[:, 0], end_positions=labels[:, 1])
        logits = pack(torch.stack([output.start_logits, output.end_logits], dim=-1).detach(), mask)
        # transformers takes the softmax over padding too; ours is over the tokens of a sequence.
        scores = torch.stack([output.start_logits, output.end_logits], dim=1)
        scores = scores.masked_fill(mask[:, None, :] == 0, float("-inf"))
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())
    else:
        output = model(**batch, labels=labels)
        logits, loss = output.logits.detach().numpy(), output.loss
    loss.backward()
    starts = np.concatenate([[0], np.cumsum(mask.sum(1).numpy())])
    return {
        "input_ids": pack(batch["input_ids"], mask).astype(np.int32),
        "token_type_ids": pack(batch["token_type_ids"], mask).astype(np.int32),
        "sequence_starts": starts.astype(np.int32),
        "labels": labels.numpy().astype(np.float32 if head == "regression" else np.int32),
        "logits": logits,
        "loss": loss.detach().numpy().reshape(1),
    }


def tiny_config(num_labels: int, hidden_act: str, layers: int) -> BertConfig:
    # A wide initializer_range lets attention and activations leave their linear range.
    return BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_act=hidden_act,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        initializer_range=0.3,
        num_labels=num_labels,
    )


def save(arrays: Arrays, path: Path, head: str) -> None:
    save_file(arrays, path, metadata={"head": head})
    path.chmod(0o644)


def make_tiny() -> None:
    for name, (head, num_labels, hidden_act, layers) in TINY_CASES.items():
        torch.manual_seed(1)
        config = tiny_config(num_labels, hidden_act, layers)
        kind = BertForQuestionAnswering if head == "span" else BertForSequenceClassification
        model = kind(config).eval()
        for parameter in model.parameters():  # biases and norms away from 0 and 1
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
        batch = make_batch(LENGTHS, config.vocab_size, seed=2)
        arrays = run(model, head, batch, make_labels(head, num_labels, LENGTHS))
        for key, parameter in model.named_parameters():
            arrays[f"weight.{key}"] = parameter.detach().numpy()
            arrays[f"gradient.{key}"] = parameter.grad.numpy()
        save(arrays, HERE / f"tiny_{name}.safetensors", head)
        text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
        (HERE / f"tiny_{name}.json").write_text(text + "\n")


def make_minilm(model_dir: str) -> None:
    """Logits, loss, and of each gradient its L2 norm and some hundred elements (largest first)."""
    model = BertForSequenceClassification.from_pretrained(
        model_dir, num_labels=3, attn_implementation="eager", dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(3)
    model.classifier.weight.data.normal_(0.0, 0.1, generator=generator)
    model.classifier.bias.data.normal_(0.0, 0.1, generator=generator)
    lengths = [24, 64, 3, 37]
    batch = make_batch(lengths, model.config.vocab_size, seed=4)
    arrays = run(model, "classification", batch, make_labels("classification", 3, lengths))
    arrays["weight.classifier.weight"] = model.classifier.weight.detach().numpy()
    arrays["weight.classifier.bias"] = model.classifier.bias.detach().numpy()
    for key, parameter in model.named_parameters():
        flat = parameter.grad.flatten()
        largest = flat.abs().topk(min(flat.numel(), SAMPLES_PER_GRADIENT // 3)).indices
        anywhere = torch.randint(flat.numel(), (SAMPLES_PER_GRADIENT,), generator=generator)
        index = torch.cat([largest, anywhere])[:SAMPLES_PER_GRADIENT]
        arrays[f"index.{key}"] = index.numpy().astype(np.int32)
        arrays[f"gradient.{key}"] = flat[index].numpy()
        arrays[f"norm.{key}"] = flat.double().norm().float().numpy().reshape(1)
    save(arrays, HERE / "minilm.safetensors", "classification")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["tiny", "minilm"])
    parser.add_argument("model_dir", nargs="?", help="folder of MiniLM-L6, for 'minilm'")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.what == "tiny":
        make_tiny()
    else:
        make_minilm(arguments.model_dir)


if __name__ == "__main__":
    main()
