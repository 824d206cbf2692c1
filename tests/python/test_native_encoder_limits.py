"""What the native encoder does not run, and what it says then."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from bitfall import _core  # noqa: E402
from bitfall.bridge.native_encoder import (  # noqa: E402
    disabled,
    install,
    parameter_layout,
    unsupported_reason,
)
from bitfall.errors import InputError  # noqa: E402
from native_bert import LENGTH, inputs_of, install_flat, make_model, run_plain  # noqa: E402


def test_errors_say_what_to_do() -> None:
    model, inputs = make_model(), inputs_of()
    install_flat(model)
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    with pytest.raises(_core.TrainingError, match="second backward pass"):
        loss.backward()
    with pytest.raises(RuntimeError, match=r"disabled\(\)"):
        model(**inputs).loss.backward(create_graph=True)
    loss = model(**inputs).loss
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()
    inputs["input_ids"][0, 0] = 40
    with pytest.raises(_core.ShapeError, match=r"input_ids\[0\] = 40"):
        model(**inputs)


def test_disabled_runs_in_pytorch_and_has_second_derivatives() -> None:
    model = make_model(attn_implementation="eager")
    expected = run_plain(model, inputs_of())[0].loss
    native, _ = install_flat(model)
    with disabled():
        loss = model(**inputs_of()).loss
    weight = model.bert.embeddings.LayerNorm.weight
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    assert torch.autograd.grad(gradient.sum(), weight)[0].norm() > 0
    assert torch.equal(loss, expected)
    assert not native.fallbacks


def _left_padded(model: Any, inputs: dict[str, Any]) -> None:
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)


def _row_without_tokens(model: Any, inputs: dict[str, Any]) -> None:
    inputs["attention_mask"][1] = 0


def _mask_of_pairs(model: Any, inputs: dict[str, Any]) -> None:
    mask = inputs["attention_mask"]
    inputs["attention_mask"] = (mask[:, None, :, None] * mask[:, None, None, :]).bool()
    inputs["attention_mask"] |= torch.eye(LENGTH, dtype=torch.bool)


def _embeddings(model: Any, inputs: dict[str, Any]) -> None:
    inputs["inputs_embeds"] = model.bert.embeddings.word_embeddings(inputs.pop("input_ids"))


def _layer_hook(model: Any, inputs: dict[str, Any]) -> None:
    model.bert.encoder.layer[0].register_forward_hook(lambda module, args, output: output)


def _frozen(model: Any, inputs: dict[str, Any]) -> None:
    model.bert.embeddings.requires_grad_(False)


def _gradient_checkpointing(model: Any, inputs: dict[str, Any]) -> None:
    model.gradient_checkpointing_enable()
    model.train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(model.config, name, 0.0)


def _dropout_switched_on(model: Any, inputs: dict[str, Any]) -> None:
    model.bert.encoder.layer[1].output.dropout.train()


def _layer_removed(model: Any, inputs: dict[str, Any]) -> None:
    del model.bert.encoder.layer[1]


FALLBACKS = [
    (_layer_removed, "has 1 layers, by its config 2"),
    (_left_padded, "begins with 0"),
    (_row_without_tokens, "all zeros"),
    (_mask_of_pairs, "attention_mask is no tensor"),
    (_embeddings, "inputs_embeds is given"),
    (_layer_hook, "hooks"),
    (_frozen, "frozen"),
    (_gradient_checkpointing, "gradient checkpointing"),
    (_dropout_switched_on, "by itself"),
    (lambda model, inputs: inputs.update(output_hidden_states=True), "output_hidden_states"),
    (lambda model, inputs: inputs.update(output_attentions=True), "output_attentions"),
]


@pytest.mark.parametrize(("change", "reason"), FALLBACKS)
def test_other_calls_run_in_pytorch_and_say_why(change: Any, reason: str) -> None:
    model, inputs = make_model(attn_implementation="eager"), inputs_of()
    native, gradients = install_flat(model)
    change(model, inputs)
    with disabled():
        torch.manual_seed(1)
        expected = model(**inputs)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=f"BertModel runs in PyTorch for this call: .*{reason}"):
        output = model(**inputs)
    assert torch.equal(torch.nan_to_num(output.logits), torch.nan_to_num(expected.logits))
    for _ in range(2):
        model(**inputs)  # warns once
    assert list(native.fallbacks.values()) == [3]
    output.loss.backward()
    assert all(not gradient.any() for gradient in gradients.values())


def test_autocast_runs_in_pytorch() -> None:
    model = make_model()
    install_flat(model)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast"):
        assert model(**inputs_of()).logits.dtype == torch.bfloat16


def _wrap_linear(model: Any) -> None:
    class Adapter(torch.nn.Linear):
        pass

    model.bert.encoder.layer[0].output.dense = Adapter(64, 32)


def _share_layers(model: Any) -> None:
    model.bert.encoder.layer[1].output.dense.weight = model.bert.encoder.layer[
        0
    ].output.dense.weight


def _own_forward(model: Any) -> None:
    model.bert.forward = lambda **inputs: None


def _extra_parameter(model: Any) -> None:
    model.bert.encoder.layer[0].register_parameter("scale", torch.nn.Parameter(torch.ones(1)))


REASONS = [
    (lambda model: model.config.update({"hidden_act": "silu"}), "hidden_act"),
    (lambda model: model.config.update({"is_decoder": True}), "is_decoder"),
    (lambda model: setattr(model.bert.encoder.layer[0].output.LayerNorm, "eps", 1e-3), "eps"),
    (lambda model: setattr(model.bert.encoder.layer[0].output.dropout, "p", 0.7), "dropout 0.7"),
    (lambda model: setattr(model.bert.embeddings.word_embeddings, "sparse", True), "sparse"),
    (lambda model: model.bert.pooler.requires_grad_(False), None),
    (lambda model: model.bert.encoder.layer[1].requires_grad_(False), "frozen"),
    (lambda model: model.bert.encoder.layer[1].double(), "torch.float64"),
    (lambda model: model.double(), "parameters are torch.float64"),
    (lambda model: model.bert.encoder.layer[0].register_forward_hook(print), "hooks"),
    (lambda model: model.resize_token_embeddings(48), None),
    (lambda model: setattr(model, "second", copy.deepcopy(model.bert)), "holds 2"),
    (_wrap_linear, "Adapter"),
    (_share_layers, "shared"),
    (_own_forward, "forward of its own"),
    (_extra_parameter, "no parameter of a plain"),
]


@pytest.mark.parametrize(("change", "reason"), REASONS)
def test_reasons_against_the_native_encoder(change: Any, reason: str | None) -> None:
    model = make_model()
    assert unsupported_reason(model) is None
    change(model)
    if reason is None:
        assert unsupported_reason(model) is None
        return
    assert reason in (unsupported_reason(model) or "")
    with pytest.raises(InputError, match=reason):
        parameter_layout(model)


def test_modules_without_a_bert() -> None:
    assert "holds no transformers BertModel" in (unsupported_reason(torch.nn.Linear(2, 2)) or "")


def test_memory_that_does_not_fit_is_refused() -> None:
    model = make_model()
    gradients = {p.name: torch.zeros(p.shape) for p in parameter_layout(model)}
    with pytest.raises(_core.ShapeError, match="adjacent"):
        install(model, gradients)
    name = "bert.embeddings.word_embeddings.weight"
    with pytest.raises(_core.ShapeError, match=r"word_embeddings.weight are f32 \[3\]"):
        install(model, gradients | {name: torch.zeros(3)})


def test_copies_run_in_pytorch_and_uninstall_restores() -> None:
    model = make_model()
    signature = inspect.signature(model.forward)
    expected = model(**inputs_of()).logits
    native, gradients = install_flat(model)
    assert inspect.signature(model.forward) == signature
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        output = other(**inputs_of())
        output.loss.backward()
        assert torch.equal(output.logits, expected)
        assert other.bert.embeddings.LayerNorm.weight.grad is not None
    assert all(not gradient.any() for gradient in gradients.values())
    native.uninstall()
    assert torch.equal(model(**inputs_of()).logits, expected)
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.bert)
