"""Gradients of the native encoder and of PyTorch, summed in the same slices."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import bitfall  # noqa: E402
from bitfall.bridge import layout  # noqa: E402
from bitfall.bridge.native_encoder import disabled, install, parameter_layout  # noqa: E402
from bitfall.bridge.native_gradients import NativeGradients  # noqa: E402
from bitfall.errors import UsageError  # noqa: E402
from native_bert import FULL, RIGHT, assert_gradients, assert_near, inputs_of, make_model  # noqa: E402


class Owner:
    """An engine's part: slices, which blocks `share` or not, and what each reduction sees."""

    def __init__(self, model: Any, share: bool, overlap: bool) -> None:
        placements = parameter_layout(model)
        self.model = model
        self.trained = layout.arrange(model, list(model.parameters()), None, placements)
        self.weights = self.memory(share=False, dtype=next(model.parameters()).dtype)
        for entry, view in zip(self.trained, self.weights, strict=True):
            view.copy_(entry.parameter.data)
            entry.parameter.data = view
        self.slices = self.memory(share, torch.float32)
        self.order: list[int] = []
        self.reduced: dict[str, Any] = {}
        self.gradients = NativeGradients(
            [placement.name for placement in placements],
            self.trained,
            self.slices,
            self.start_reduction,
            lambda index: self.slices[index].zero_(),
            overlap=overlap,
            every_backward=share,
        )
        names = [entry.name for entry in self.trained]
        install(model, dict(zip(names, self.slices, strict=True)), self.gradients)

    def memory(self, share: bool, dtype: Any) -> list[Any]:
        ends: dict[int, int] = {}
        flat = torch.full((2 * sum(e.parameter.numel() for e in self.trained),), torch.nan).to(
            dtype
        )
        views = []
        for entry in self.trained:
            region = entry.block if share else 0
            end = ends.get(region, 0)
            begin = end if entry.adjacent else (end + 15) // 16 * 16
            ends[region] = begin + entry.parameter.numel()
            views.append(flat[begin : ends[region]].view(entry.parameter.shape))
        return views

    def start_reduction(self, block: int, accumulate: bool) -> None:
        self.order.append(block)
        for entry, view in zip(self.trained, self.slices, strict=True):
            if entry.block == block:
                earlier = self.reduced.get(entry.name, 0) if accumulate else 0
                self.reduced[entry.name] = earlier + view

    def run(self, batches: list[Any], plain: Any = ()) -> dict[str, Any]:
        """Gradients of the sum of all losses; the batches numbered in `plain` run in PyTorch."""
        for index, batch in enumerate(batches):
            if index in plain:
                with disabled():
                    loss = self.model(**batch).loss
            else:
                loss = self.model(**batch).loss
            with self.gradients.backward(index + 1 == len(batches)):
                loss.backward()
        self.gradients.finish()
        return self.reduced


def expected_of(model: Any, batches: list[Any]) -> dict[str, Any]:
    other = copy.deepcopy(model)
    for batch in batches:
        other(**batch).loss.backward()
    return {name: p.grad for name, p in other.named_parameters()}


@pytest.mark.parametrize("plain", [(), (0,), (1,)])
@pytest.mark.parametrize(("share", "overlap"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_micro_batches_add_up(name: str, share: bool, overlap: bool, plain: Any) -> None:
    model = make_model(name)
    batches = [inputs_of(name, RIGHT), inputs_of(name, FULL)]
    expected = expected_of(model, batches)
    owner = Owner(model, share, overlap)
    for _ in range(2):  # the second step starts from the first one's leftovers
        owner.order.clear()
        assert_gradients(owner.run(batches, plain), expected)
        assert owner.order == [1, 0, -1] * (2 if share else 1)
        owner.gradients.clear()


def test_16_bit_parameters_keep_no_grad_of_their_own() -> None:
    model = make_model().bfloat16()
    owner = Owner(model, share=False, overlap=False)
    reduced = owner.run([inputs_of()])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(gradient.dtype == torch.float32 for gradient in reduced.values())
    assert all(gradient.isfinite().all() for gradient in reduced.values())


def test_wrong_use_is_refused() -> None:
    model = make_model("BertForTokenClassification")
    inputs = inputs_of("BertForTokenClassification")
    owner = Owner(model, share=False, overlap=True)
    with pytest.raises(UsageError, match=r"engine.backward\(loss\)"):
        model(**inputs).loss.backward()
    loss = model(**inputs).loss + model(**inputs).loss
    with pytest.raises(UsageError, match="two forward passes"), owner.gradients.backward(True):
        loss.backward()


@pytest.mark.parametrize("stage", [0, 2])
def test_an_engine_trains_alike_natively_and_in_pytorch(stage: int, capfd: Any) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
    }
    weights, said = [], []
    for native in (True, False):
        model = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        own = {"bitfall": {"native_encoder": native}}
        engine = bitfall.initialize(model=model, config=config | own)[0]
        said.append(capfd.readouterr().err)
        for index in range(4):
            engine.backward(engine(**inputs_of(mask=[12, 5 + index, 1, 7])).loss)
            engine.step()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        engine.destroy()
    assert "native encoder" in said[0]
    assert "PyTorch runs the model (bitfall.native_encoder is false)" in said[1]
    for name, expected in weights[1].items():
        if "key.bias" not in name:  # Adam makes steps of the rounding errors of a zero gradient
            assert_near(weights[0][name], expected, name)
