"""BERT models with random weights and inputs for the tests of the native encoder."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from bitfall.bridge.native_encoder import NativeEncoder, install, parameter_layout

BATCH, LENGTH, LABELS = 4, 12, 3
CONFIG = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
    "num_labels": LABELS,
}
READ_FIRST_TOKEN = [
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
]
READ_LABELLED_TOKENS = ["BertForTokenClassification", "BertForMaskedLM"]
READ_EVERYTHING = ["BertModel", "BertForQuestionAnswering", "BertForPreTraining", "OwnModule"]
FULL, RIGHT = [12, 12, 12, 12], [12, 5, 1, 7]


class OwnModule(torch.nn.Module):
    """A user's module: the mean over all positions, padding too."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.encoder = transformers.BertModel(config)
        self.head = torch.nn.Linear(config.hidden_size, LABELS)

    def forward(self, labels: Any, **inputs: Any) -> dict[str, Any]:
        logits = self.head(self.encoder(**inputs)[0].mean(1))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def make_model(name: str = "BertForSequenceClassification", **config: Any) -> Any:
    torch.manual_seed(3)
    if name == "BertForQuestionAnswering":
        config["num_labels"] = 2
    model_class = OwnModule if name == "OwnModule" else getattr(transformers, name)
    model = model_class(transformers.BertConfig(**CONFIG | config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def flat_views(module: Any, dtype: Any) -> dict[str, Any]:
    """A tensor per parameter of the layout, all in one buffer of zeros as in a ParameterStore."""
    layout = parameter_layout(module)
    begins, end = [], 0
    for placement in layout:
        begins.append(end if placement.adjacent else (end + 15) // 16 * 16)
        end = begins[-1] + torch.Size(placement.shape).numel()
    flat = torch.zeros(end, dtype=dtype)
    return {
        p.name: flat[begin : begin + torch.Size(p.shape).numel()].view(p.shape)
        for p, begin in zip(layout, begins, strict=True)
    }


def install_flat(module: Any) -> tuple[NativeEncoder, dict[str, Any]]:
    """Moves the parameters into one buffer, as the bridge does; returns the f32 gradients too."""
    parameters = dict(module.named_parameters())
    for name, view in flat_views(module, next(module.parameters()).dtype).items():
        view.copy_(parameters[name].data)
        parameters[name].data = view
    gradients = flat_views(module, torch.float32)
    return install(module, gradients), gradients


def mask_of(kind: Any) -> Any:
    """[BATCH, LENGTH] from the number of real tokens of each row."""
    columns = torch.arange(LENGTH)
    if kind == "holes":
        rows = [columns >= 3, columns % 2 == 0, (columns > 2) & (columns < 6), columns != 1]
        return torch.stack(rows).long()
    return (columns < torch.tensor(kind)[:, None]).long()


def integers(high: int, *shape: int) -> Any:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(5 + len(shape)))


def inputs_of(name: str = "BertForSequenceClassification", mask: Any = RIGHT) -> dict[str, Any]:
    ids = {
        "input_ids": integers(39, BATCH, LENGTH) + 1,
        "token_type_ids": integers(2, BATCH, LENGTH),
    }
    if mask is not None:
        ids["attention_mask"] = mask_of(mask)
        ids["input_ids"] *= ids["attention_mask"]
    pairs = integers(2, BATCH)
    if name == "BertForQuestionAnswering":
        return ids | {"start_positions": pairs, "end_positions": integers(LENGTH, BATCH)}
    if name == "BertForMultipleChoice":
        return {key: torch.stack([ids[key], ids[key].flip(0)], 1) for key in ids} | {
            "labels": pairs
        }
    if name in READ_LABELLED_TOKENS:
        labels = integers(LABELS, BATCH, LENGTH)
        return ids | {
            "labels": labels - (0 if mask is None else 1 - mask_of(mask)) * (100 + labels)
        }
    if name == "BertForPreTraining":
        return ids | {"labels": integers(40, BATCH, LENGTH), "next_sentence_label": pairs}
    return ids if name == "BertModel" else ids | {"labels": pairs}


def loss_of(output: Any) -> Any:
    """The loss, or for a BertModel a sum over all outputs with changing weights."""
    if output.get("loss") is not None:
        return output["loss"]
    outputs = (output.last_hidden_state, output.pooler_output)
    return sum((o * torch.arange(o.numel()).view(o.shape).sin()).sum() for o in outputs)


def run_plain(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Output and gradients of a copy that never heard of bitfall."""
    plain = copy.deepcopy(model)
    output = plain(**inputs)
    loss_of(output).backward()
    return output, {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


def all_gradients(model: Any, native: dict[str, Any]) -> dict[str, Any]:
    """PyTorch's of the head, the encoder's, and their sum for a tied parameter."""
    torchs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torchs | {name: g + torchs.get(name, 0) for name, g in native.items()}


def assert_near(seen: Any, expected: Any, what: str = "", least_norm: Any = 0.0) -> None:
    """Within 1e-5, relative to the norm of `expected` or a larger `least_norm`."""
    error = (seen - expected).norm() / max(expected.norm(), least_norm)
    assert error < 1e-5, f"{what}: relative error {error}"


def assert_gradients(seen: dict[str, Any], expected: dict[str, Any]) -> None:
    assert seen.keys() >= expected.keys()
    # Some gradients are zero but for rounding: a shift of all scores of a softmax changes nothing.
    least_norm = 0.05 * max(gradient.norm() for gradient in expected.values())
    for name, value in expected.items():
        assert_near(seen[name], value, name, least_norm)
