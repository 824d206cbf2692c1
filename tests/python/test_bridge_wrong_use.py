"""What the bridge refuses, and what it says then."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import bitfall  # noqa: E402
from bitfall import _core  # noqa: E402
from bitfall.errors import InputError, UsageError  # noqa: E402
from bridge_models import CONFIG, batches, tiny  # noqa: E402
from conftest import environment  # noqa: E402


def start(model: Any = None, **changes: Any) -> Any:
    """The engine of a Tiny with some keys of CONFIG changed."""
    return bitfall.initialize(model=model or tiny(), config={**CONFIG, **changes})[0]


def train(engine: Any) -> None:
    engine.backward(engine(*batches(1)[0]))
    engine.step()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "--learning_rate"),
        ({"quantise_training": {}}, "quantize_training"),
        ({"zero_optimization": {"stage": 3}}, "stage 3"),
    ],
)
def test_errors_of_the_config(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(_core.ConfigError, match=words):
        start(**changes)


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="no config"):
        bitfall.initialize(model=tiny())
    with pytest.raises(InputError, match="expected a torch"):
        bitfall.initialize(model=None, config=CONFIG)
    with pytest.raises(InputError, match="not in the model"):
        bitfall.initialize(model=tiny(), model_parameters=tiny().parameters(), config=CONFIG)
    with pytest.raises(InputError, match="switch on bf16"):
        start(tiny().bfloat16())
    with pytest.raises(InputError, match="on meta, expected cpu or cuda"):
        start(torch.nn.Linear(2, 2, device="meta"))
    model = tiny()
    client = torch.optim.LBFGS(model.parameters())
    with pytest.raises(InputError, match="LBFGS"):
        bitfall.initialize(model=model, optimizer=client, config=CONFIG)


def test_a_second_initialize() -> None:
    model = tiny()
    engine = start(model)
    with pytest.raises(UsageError, match="destroy"):
        start(model)
    with pytest.raises(UsageError, match="an engine already"):
        start(engine)
    for with_the_same_parameters in (model.layers[0], torch.nn.Sequential(model)):
        with pytest.raises(UsageError, match="or a part of it"):
            start(with_the_same_parameters)
    engine.destroy()
    other = start(model)
    train(other)
    with pytest.raises(UsageError, match="optimizer"):
        engine.step()


def test_step_before_backward() -> None:
    engine = start()
    with pytest.raises(UsageError, match=r"call engine\.backward"):
        engine.step()
    train(engine)
    for step in (engine.step, engine.optimizer.step):
        with pytest.raises(UsageError, match=r"call engine\.backward"):
            step()


def test_loss_backward_outside_of_the_engine() -> None:
    engine = start()
    with pytest.raises(UsageError, match=r"engine\.backward\(loss\)"):
        engine(*batches(1)[0]).backward()


def test_gradients_taken_away() -> None:
    engine = start()
    engine.backward(engine(*batches(1)[0]))
    engine.module.zero_grad(set_to_none=True)
    with pytest.raises(UsageError, match="set_to_none"):
        engine.step()
    engine.zero_grad()
    train(engine)


def test_parameters_that_left_the_memory() -> None:
    engine = start()
    engine.module.head.double()
    engine.backward(engine.module.embed.weight.sum())
    with pytest.raises(UsageError, match=r"embed\.weight.*before it"):
        engine.step()


def test_unfrozen_after_initialize() -> None:
    model = tiny()
    model.head.bias.requires_grad_(False)
    engine = start(model)
    model.head.bias.requires_grad_(True)
    engine.backward(engine(*batches(1)[0]))
    with pytest.raises(UsageError, match=r"head\.bias.*frozen"):
        engine.step()


def test_a_parameter_that_came_after_initialize() -> None:
    engine = start()
    engine.module.head.bias = torch.nn.Parameter(torch.zeros(24))
    engine.backward(engine(*batches(1)[0]))
    with pytest.raises(UsageError, match=r"head\.bias' was not in the model"):
        engine.step()


def test_wrong_losses() -> None:
    engine = start()
    with pytest.raises(UsageError, match="one element"):
        engine.backward(torch.ones(3, requires_grad=True))
    with torch.no_grad():
        loss = engine(*batches(1)[0])
    with pytest.raises(UsageError, match="no_grad"):
        engine.backward(loss)


def test_torch_is_needed_only_by_initialize() -> None:
    """`import bitfall` works without torch, and initialize says what is missing."""
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import bitfall\n"
        "try:\n    bitfall.initialize(model=None)\n"
        "except ValueError as error:\n    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True
    )
    assert "pip install" in result.stdout, result.stderr
