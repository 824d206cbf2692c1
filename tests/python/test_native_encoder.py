"""The native encoder under transformers' BERT classes, against the same in plain PyTorch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from bitfall.bridge.native_encoder import (  # noqa: E402
    GradientSink,
    install,
    parameter_layout,
)
from native_bert import (  # noqa: E402
    BATCH,
    FULL,
    LENGTH,
    READ_EVERYTHING,
    READ_FIRST_TOKEN,
    READ_LABELLED_TOKENS,
    RIGHT,
    all_gradients,
    assert_gradients,
    assert_near,
    flat_views,
    inputs_of,
    install_flat,
    integers,
    loss_of,
    make_model,
    mask_of,
    run_plain,
)


@pytest.fixture(autouse=True)
def _no_unexpected_fallback() -> Iterator[None]:
    """A call that runs in PyTorch warns; tests that want that catch the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="BertModel runs in PyTorch")
        yield


def cases() -> Iterator[tuple[str, Any]]:
    for name in (*READ_FIRST_TOKEN, *READ_LABELLED_TOKENS, *READ_EVERYTHING):
        yield from ((name, None), (name, FULL), (name, RIGHT))
    yield from ((name, "holes") for name in (*READ_LABELLED_TOKENS, *READ_EVERYTHING))


@pytest.mark.parametrize(("name", "mask"), list(cases()))
def test_outputs_and_every_gradient_are_those_of_pytorch(name: str, mask: Any) -> None:
    model, inputs = make_model(name), inputs_of(name, mask)
    expected, expected_gradients = run_plain(model, inputs)
    native, gradients = install_flat(model)
    output = model(**inputs)
    for key, value in expected.items():
        # The hidden states of padding that nobody reads are zeros.
        unread = name in READ_LABELLED_TOKENS and mask is not None and key == "logits"
        real = mask_of(mask) == 1 if unread else ...
        assert_near(output[key][real], value[real], key)
    loss_of(output).backward()
    assert_gradients(all_gradients(model, gradients), expected_gradients)
    assert not native.fallbacks


@pytest.mark.parametrize(
    "options", [{"hidden_act": "gelu_new"}, {"hidden_act": "relu"}, {"eps": 1}]
)
def test_what_the_config_says_is_followed(options: dict[str, Any]) -> None:
    model = make_model(**({"layer_norm_eps": 1e-3} if "eps" in options else options))
    expected, expected_gradients = run_plain(model, inputs_of())
    _, gradients = install_flat(model)
    output = model(**inputs_of())
    assert_near(output.logits, expected.logits)
    output.loss.backward()
    assert_gradients(all_gradients(model, gradients), expected_gradients)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForQuestionAnswering"])
def test_bf16_is_as_near_to_f32_as_pytorch_in_bf16(name: str) -> None:
    model, inputs = make_model(name), inputs_of(name)
    _, exact = run_plain(model, inputs)
    _, half = run_plain(model.bfloat16(), inputs)
    _, gradients = install_flat(model)
    output = model(**inputs)
    assert output[1].dtype == torch.bfloat16
    output.loss.backward()
    seen = all_gradients(model, gradients)

    def distance(values: dict[str, Any]) -> float:
        return sum(float((values[key].float() - exact[key]).norm()) ** 2 for key in exact) ** 0.5

    assert distance(seen) < 1.5 * distance(half)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_position_ids_and_default_token_types() -> None:
    model, inputs = make_model("BertModel"), inputs_of("BertModel")
    del inputs["token_type_ids"]
    positions = (torch.arange(LENGTH).flip(0) + 2)[None]
    for extra in ({}, {"position_ids": positions}, {"position_ids": positions.repeat(BATCH, 1)}):
        expected = copy.deepcopy(model)(**inputs, **extra)
        if not hasattr(model, "_bitfall_native_encoder"):
            install_flat(model)
        assert_near(model(**inputs, **extra)[0], expected[0])


def test_masks_of_other_dtypes_and_tuples() -> None:
    model, inputs = make_model("BertModel"), inputs_of("BertModel")
    expected = model(**inputs)
    install_flat(model)
    for dtype in (torch.bool, torch.int32, torch.float32):
        mask = inputs["attention_mask"].to(dtype)
        assert_near(model(inputs["input_ids"], mask, inputs["token_type_ids"])[0], expected[0])
    states, pooled = model(**inputs, return_dict=False)
    assert_near(states, expected.last_hidden_state)
    assert_near(pooled, expected.pooler_output)


def test_without_dropout_training_is_as_in_pytorch() -> None:
    model = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    expected, expected_gradients = run_plain(model, inputs_of())
    _, gradients = install_flat(model)
    output = model(**inputs_of())
    output.loss.backward()
    assert_near(output.loss, expected.loss)
    assert_gradients(all_gradients(model, gradients), expected_gradients)


def test_dropout_follows_pytorchs_seed() -> None:
    model, inputs = make_model("BertModel").train(), inputs_of("BertModel")
    install_flat(model)

    def states(seed: int) -> Any:
        torch.manual_seed(seed)
        return model(**inputs)[0]

    first = states(1)
    assert torch.equal(states(1), first)
    assert not torch.equal(states(2), first)
    following = model(**inputs)[0]
    assert not torch.equal(following, states(2))
    with torch.no_grad():
        assert torch.equal(states(1), first)
    assert not torch.equal(model.eval()(**inputs)[0], first)


def test_several_forward_passes_may_wait_for_their_backward_passes() -> None:
    model = make_model()
    inputs = [inputs_of(mask=mask) for mask in (RIGHT, FULL, [3, 3, 9, 1])]
    expected = [run_plain(model, one)[1] for one in inputs]
    _, gradients = install_flat(model)
    model(**inputs[2]).loss.backward  # noqa: B018  a graph that is dropped
    losses = [model(**one).loss for one in inputs[:2]]
    with torch.no_grad():
        model(**inputs[2])
    for loss in losses:
        loss.backward()
    total = {name: expected[0][name] + expected[1][name] for name in expected[0]}
    assert_gradients(all_gradients(model, gradients), total)


def test_gradients_are_added_and_parameters_may_move() -> None:
    model = make_model()
    _, once = run_plain(model, inputs_of())
    other_memory = flat_views(model, torch.float32)
    _, gradients = install_flat(model)
    model(**inputs_of()).loss.backward()
    for name, view in other_memory.items():
        parameter = model.get_parameter(name)
        parameter.data = view.copy_(parameter.data)
    model(**inputs_of()).loss.backward()
    twice = {name: 2 * gradient for name, gradient in once.items()}
    assert_gradients(all_gradients(model, gradients), twice)


class Collector(GradientSink):
    """Takes each block's gradients as soon as they are complete, from memory that blocks share."""

    def __init__(self, model: Any) -> None:
        self.layout = parameter_layout(model)
        self.slices = flat_views(model, torch.float32)
        first = {p.name.partition("layer.0.")[2]: p.name for p in self.layout if p.block == 0}
        for place in self.layout:
            if place.block > 0:
                inner = place.name.partition(f"layer.{place.block}.")[2]
                self.slices[place.name] = self.slices[first[inner]]
        self.taken: dict[str, Any] = {}
        self.order: list[int] = []

    def begin(self) -> bool:
        for view in self.slices.values():
            view.fill_(torch.nan)
        return False

    def complete(self, block: int) -> None:
        self.order.append(block)
        for place in self.layout:
            if place.block == block:
                self.taken[place.name] = self.slices[place.name].clone()


@pytest.mark.parametrize("mask", [None, RIGHT])
def test_blocks_may_share_memory_if_passes_overwrite(mask: Any) -> None:
    model, inputs = make_model(), inputs_of(mask=mask)
    inputs["input_ids"][0, 3] = 0  # the padding_idx among real tokens
    _, expected = run_plain(model, inputs)
    sink = Collector(model)
    for name, view in flat_views(model, torch.float32).items():
        view.copy_(model.get_parameter(name).data)
        model.get_parameter(name).data = view
    install(model, sink.slices, sink)
    model(**inputs).loss.backward()
    assert sink.order == [1, 0, -1]
    assert_gradients(all_gradients(model, sink.taken), expected)


def test_errors_of_a_sink_reach_the_caller() -> None:
    model = make_model()
    native, _ = install_flat(model)
    native.sink.complete = lambda block: {}[block]  # type: ignore[method-assign]
    with pytest.raises(KeyError, match="1"):
        model(**inputs_of()).loss.backward()


def test_replaced_modules_are_seen() -> None:
    model = make_model()
    _, gradients = install_flat(model)
    model(**inputs_of())
    dense = torch.nn.Linear(64, 32)
    model.bert.encoder.layer[1].output.dense = dense
    expected, expected_gradients = run_plain(model, inputs_of())
    output = model(**inputs_of())
    assert_near(output.logits, expected.logits)
    output.loss.backward()
    assert_gradients(all_gradients(model, gradients), expected_gradients)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_around_the_bert(use_reentrant: bool) -> None:
    model, inputs = make_model("BertModel"), inputs_of("BertModel")
    _, expected = run_plain(model, inputs)
    _, gradients = install_flat(model)
    anchor = torch.ones((), requires_grad=True)

    def run(one: Any) -> tuple[Any, Any]:
        output = model(**inputs)
        return output[0] * one, output[1] * one

    states, pooled = torch.utils.checkpoint.checkpoint(run, anchor, use_reentrant=use_reentrant)
    output = transformers.modeling_outputs.BaseModelOutputWithPooling(states, pooled)
    loss_of(output).backward()
    assert_gradients(all_gradients(model, gradients), expected)


def test_padding_idx_gets_no_gradient_as_in_pytorch() -> None:
    model, inputs = make_model(), inputs_of()
    del inputs["attention_mask"]  # the padding is read as if it were text
    _, expected = run_plain(model, inputs)
    _, gradients = install_flat(model)
    name = "bert.embeddings.word_embeddings.weight"
    gradients[name][0] = 7.0
    model(**inputs).loss.backward()
    assert (gradients[name][0] == 7.0).all()
    gradients[name][0] = 0.0
    assert_gradients(all_gradients(model, gradients), expected)


def test_a_direct_call_of_the_bert_gives_all_hidden_states() -> None:
    model, inputs = make_model(), inputs_of("BertModel")
    expected = model.bert(**inputs)
    install_flat(model)
    assert_near(model.bert(**inputs).last_hidden_state, expected.last_hidden_state)
    model(**inputs_of())
    assert_near(model.bert(**inputs).last_hidden_state, expected.last_hidden_state)


def test_minilm_in_f32(minilm_dir: Any) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(minilm_dir).eval()
    lengths = torch.tensor([3, 30, 17])
    mask = (torch.arange(30) < lengths[:, None]).long()
    inputs = {"input_ids": integers(30000, 3, 30), "attention_mask": mask}
    inputs["labels"] = torch.tensor([0, 1, 1])
    expected, expected_gradients = run_plain(model, inputs)
    _, gradients = install_flat(model)
    output = model(**inputs)
    assert_near(output.logits, expected.logits)
    output.loss.backward()
    assert_gradients(all_gradients(model, gradients), expected_gradients)
