"""MoQ on modules of every kind: recurrent, convolutional, attention, and transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import bitfall  # noqa: E402
from bridge_models import CONFIG, batches  # noqa: E402
from torch import nn  # noqa: E402

MOQ = {
    "enabled": True,
    "quantize_bits": {"start_bits": 8, "target_bits": 3},
    "quantize_schedule": {"quantize_period": 1, "schedule_offset": 0},
}
STEPS = 20  # 8 bits to 3 take 2^4 + 1


class EveryKind(nn.Module):
    """Returns the loss; its parameters have 1 to 5 dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.conv1d = nn.Conv1d(16, 16, 3, padding=1)
        self.lstm = nn.LSTM(16, 8, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.conv2d = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv3d = nn.Conv3d(1, 4, (3, 3, 2))
        self.bilinear = nn.Bilinear(16, 16, 8)
        self.head = nn.Linear(16, 24)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.conv1d(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        x = self.gru(self.lstm(x)[0])[0]
        x = self.encoder(x + self.attention(x, x, x)[0])
        image = self.norm(self.conv2d(x[:, None])).mean((2, 3))
        volume = self.conv3d(x[:, None, :, :, None].expand(-1, -1, -1, -1, 2)).mean((2, 3, 4))
        pairs = self.bilinear(x.mean(1), x[:, 0])
        logits = self.head(torch.cat([pairs, image, volume], -1))
        return nn.functional.cross_entropy(logits.float(), labels)


def engine_for(model: Any, layer_name: str | None = None, **changes: Any) -> Any:
    eigenvalue = {"enabled": True, "max_iter": 10, "layer_name": layer_name}
    quantize = {**MOQ, "eigenvalue": eigenvalue} if layer_name else MOQ
    config = {**CONFIG, "quantize_training": quantize, **changes}
    return bitfall.initialize(model=model, config=config)[0]


def every_kind() -> EveryKind:
    torch.manual_seed(0)
    return EveryKind()


def levels(parameter: torch.Tensor) -> int:
    return parameter.detach().unique().numel()


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=["f32", "bf16"])
def test_every_kind_of_parameter_is_trained_and_quantized(precision: dict[str, Any]) -> None:
    model = every_kind()
    assert {p.dim() for p in model.parameters()} == {1, 2, 3, 4, 5}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = engine_for(model, **precision)
    (batch,) = batches(1)
    losses = []
    for _ in range(STEPS):
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {name for name, p in model.named_parameters() if p.dim() > 1 and levels(p) > 8} == set()
    assert levels(model.lstm.bias_ih_l0) > 8  # vectors are not quantized
    for name, parameter in model.named_parameters():
        assert parameter.shape == before[name].shape
        assert not torch.equal(parameter.float(), before[name]), name


def test_eigenvalues_of_a_layer_list_that_the_config_names() -> None:
    engine = engine_for(every_kind(), "encoder.layers")
    found = []
    for batch in batches(3):
        engine.backward(engine(*batch))
        engine.step()
        found += engine.last_result["eigenvalues"]
    assert {entry["name"] for entry in found} == {"encoder.layers.0", "encoder.layers.1"}
    assert all(entry["value"] > 0 for entry in found)


def test_five_dimensions_in_a_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    engine = engine_for(every_kind())
    engine.backward(engine(*batches(1)[0]))
    engine.step()
    engine.save_checkpoint(tmp_path, tag="one")
    saved = load_file(tmp_path / "one" / "model.safetensors")
    assert list(saved["conv3d.weight"].shape) == [4, 1, 3, 3, 2]
    other = engine_for(EveryKind())
    other.load_checkpoint(tmp_path)
    assert torch.equal(other.module.conv3d.weight, engine.module.conv3d.weight)


def vit() -> tuple[Any, dict[str, Any], str]:
    """A tiny ViT, a batch, and the path of its layers, which differs between releases."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    model = transformers.ViTForImageClassification(config)
    name = next(n for n, _ in model.named_parameters() if ".0." in n)
    batch = {"pixel_values": torch.rand(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
    return model, batch, name.partition(".0.")[0]


def distilbert() -> tuple[Any, dict[str, Any], str]:
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(
        dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=24, max_position_embeddings=8
    )
    model = transformers.DistilBertForSequenceClassification(config)
    batch = {"input_ids": batches(1)[0][0], "labels": torch.tensor([0, 1, 1, 0])}
    return model, batch, "distilbert.transformer.layer"


@pytest.mark.parametrize("make", [vit, distilbert])
def test_models_of_transformers_with_eigenvalues(make: Any) -> None:
    torch.manual_seed(0)
    model, batch, layers = make()
    engine = engine_for(model, layers)
    losses, names = [], set()
    for _ in range(4):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        names |= {entry["name"] for entry in engine.last_result["eigenvalues"]}
    assert losses[-1] < losses[0]
    assert names == {f"{layers}.0", f"{layers}.1"}
    assert engine.bits()["other"] < 8
