"""What docs/ says of configs is what the config reader does."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
from bitfall import _core

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "from_deepspeed.md"
ON = {"true": "false", "false": "true", "0": "7", "1.0": "2.0"}

# What stands beside a key so that the file is complete; keys that exclude the others.
SURROUNDINGS = {
    "optimizer": {"type": "AdamW"},
    "eigenvalue": {},
}
SCHEDULER_OF = {
    "total_num_steps": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 1e-3}},
    "warmup_min_ratio": {"type": "WarmupCosineLR"},
    "cos_min_ratio": {"type": "WarmupCosineLR"},
    "num_warmup_steps": {"type": "linear"},
    "num_training_steps": {"type": "linear"},
}
ONE_CYCLE = {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-4, "cycle_momentum": False}


def rows() -> list[tuple[str, object, str]]:
    """(key path, example, what happens) of the guide's tables."""
    found = []
    for line in GUIDE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        match = re.match(r"(read|ignored|only off|refused)\b", cells[-1])
        if len(cells) != 3 or match is None:
            continue
        first = ""
        for key in re.findall(r"`([^`]+)`", cells[0]):
            first = first or key
            path = first.rpartition(".")[0] + key if key.startswith(".") else key
            found.append((path, json.loads(cells[1].strip("`")), cells[-1]))
    return found


def scheduler_for(key: str) -> dict:
    if key.startswith(("cycle_", "decay_")):
        return {"type": "OneCycle", "params": dict(ONE_CYCLE)}
    if key.startswith("lr_range_test_"):
        return {"type": "LRRangeTest"}
    return SCHEDULER_OF.get(key, {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}})


def config_with(path: str, value: object) -> dict:
    """A config that sets one key, and what it cannot do without."""
    parts = path.split(".")
    config: dict = {}
    if parts[0] == "scheduler" and len(parts) > 2:
        config["scheduler"] = json.loads(json.dumps(scheduler_for(parts[-1])))
    if parts[0] == "optimizer":
        config["optimizer"] = {"type": "AdamW"}
    if path.startswith("quantize_training.") and parts[-1] != "enabled":
        config["quantize_training"] = {"enabled": False}
    section = config
    for part in parts[:-1]:
        section = section.setdefault(part, {})
    section[parts[-1]] = value
    return config


def parse(config: dict):
    flags = {"bitfall.num_training_steps": {"flag": "", "json": "100", "given": False}}
    return _core.parse_config(json.dumps(config), "test.json", flags)


def test_the_tables_are_found():
    assert len(rows()) > 150


@pytest.mark.parametrize(("path", "example", "text"), rows(), ids=lambda value: str(value)[:60])
def test_every_key_does_what_the_guide_says(path, example, text):
    if text.startswith("refused"):
        with pytest.raises(_core.ConfigError, match=re.escape(path)):
            parse(config_with(path, example))
        return
    completed = parse(config_with(path, example))
    about = [warning for warning in completed.warnings if f"{path}:" in warning]
    assert any("ignored" in warning for warning in about) == text.startswith("ignored")
    assert bool(about) == (text.startswith("ignored") or "with a warning:" in text)
    if text.startswith("only off") and not isinstance(example, dict):
        switched_on = json.loads(ON[json.dumps(example)])
        with pytest.raises(_core.ConfigError, match=re.escape(path)):
            parse(config_with(path, switched_on))


def test_every_key_of_the_reader_is_in_the_guide():
    sources = "".join(
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "engine").glob("config*.cpp"))
    )
    call = (
        r"\b(?:integer|number|flag|text|choice|section|patterns|required|training_steps|has|take"
        r"|warmup_steps|find_integer|find_number|ignore|only_off|find)\(\s*\{?((?:\"[\w-]+\",?\s*)+)"
    )
    lists = r"kIgnored = \{(.*?)\}|kOnlyOff = \{(.*?)\}|kWithoutEffect = \{(.*?)\}"
    quoted = [match.group(1) for match in re.finditer(call, sources)]
    quoted += ["".join(filter(None, match.groups())) for match in re.finditer(lists, sources, re.S)]
    keys = {key for text in quoted for key in re.findall(r'"([\w-]+)"', text)}
    values = {"", "auto", "symmetric", "nearest", "step", "log", "AdamW", "DeepSpeedJobName"}
    guide = GUIDE.read_text(encoding="utf-8")
    missing = [key for key in sorted(keys - values) if not re.search(rf"\b{key}\b", guide)]
    assert missing == []
    assert len(keys) > 120


def json_blocks() -> list[tuple[str, str]]:
    """(page and number, text) of every JSON example in the documentation."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        blocks = re.findall(r"```json\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
        found += [(f"{page.name}-{index}", text) for index, text in enumerate(blocks)]
    return found


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in json_blocks()])
def test_every_config_example_is_accepted(text):
    filled = re.sub(r'"\w+": "auto",?', "", text)  # the command line fills these
    completed = _core.parse_config(filled, "example", {})
    assert not any("ignored" in warning for warning in completed.warnings)


API = ROOT / "docs" / "deepspeed_api.md"
STATUSES = ("supported", "ignored", "refused", "absent")


def api_rows(section: str) -> list[tuple[str, str]]:
    """(name, status) of the table under the heading `section` of the API page."""
    text = API.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[1] in STATUSES:
            found.append((cells[0].strip("`"), cells[1]))
    return found


def lookup(name: str) -> object:
    """A dotted name of the package deepspeed, importing modules as it needs."""
    parts = name.split(".")
    value: object = importlib.import_module(parts[0])
    for count, part in enumerate(parts[1:], 2):
        try:
            value = getattr(value, part)
        except AttributeError:
            if inspect.ismodule(value) and not part[0].isupper():
                value = importlib.import_module(".".join(parts[:count]))
            else:
                raise
    return value


@pytest.fixture
def deepspeed_names(monkeypatch: pytest.MonkeyPatch):
    """bitfall's package deepspeed can be imported."""
    pytest.importorskip("torch")
    from bitfall import deepspeed_import

    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    deepspeed_import.install()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        del sys.modules[name]


def test_the_api_page_has_its_tables():
    assert len(api_rows("Module")) > 40


@pytest.mark.usefixtures("deepspeed_names")
@pytest.mark.parametrize(
    ("name", "status"), [row for row in api_rows("Module") if row[0].startswith("deepspeed.")]
)
def test_every_module_name_is_as_the_api_page_says(name, status):
    if status == "absent":
        with pytest.raises((AttributeError, ModuleNotFoundError), match="bitfall does not provide"):
            lookup(name)
        return
    value = lookup(name)
    if status == "refused":
        with (
            pytest.raises(_core.UnsupportedError, match="not in bitfall"),
            contextlib.ExitStack() as stack,
        ):
            stack.enter_context(value())


def test_the_training_loop_of_the_guide_learns_and_quantizes(tmp_path, monkeypatch, capsys):
    """Runs the Python example as it stands."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    text = GUIDE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(compile(code, str(GUIDE), "exec"), names)
    assert names["loss"].item() < 0.68
    assert names["client_state"] == {"epoch": 1}
    weight = names["model"][2].weight.detach().reshape(4, -1)
    assert all(len(group.unique()) <= 16 for group in weight)


@pytest.fixture(scope="module")
def engine():
    torch = pytest.importorskip("torch")
    import bitfall

    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW"}}
    return bitfall.initialize(model=torch.nn.Linear(8, 4), config=config)[0]


@pytest.mark.parametrize(("name", "status"), api_rows("Engine"))
def test_every_name_of_the_engine_is_as_the_api_page_says(engine, name, status):
    assert hasattr(engine, name) == (status != "absent")


def test_the_arguments_of_initialize_are_those_of_the_api_page():
    pytest.importorskip("torch")
    import bitfall

    listed = {name for name, _ in api_rows("Module") if "." not in name} | {"config_params"}
    assert listed == set(inspect.signature(bitfall.initialize).parameters)
