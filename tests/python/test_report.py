"""The HTML report: every section, unfinished and hostile logs, size, self-containment."""

import json
import math
from html.parser import HTMLParser

import pytest
from bitfall.cli import main
from bitfall.errors import DataError
from bitfall.report import write_report
from bitfall.report_chart import doubling_axis, linear_axis, log_axis, number, smooth, thin
from bitfall.report_log import read_log

LAYERS = [f"bert.encoder.layer.{i}" for i in range(3)]
STATES = [*LAYERS, "other"]


def start_event(**fields):
    return {
        "event": "start",
        "config": {"optimizer": {"params": {"lr": 2e-5}}, "gradient_clipping": 1.0},
        "origins": {"optimizer.params.lr": "flag --learning_rate"},
        "model": {"path": "mini-bert"},
        "task": "mrpc",
        **fields,
    }


def step_event(step, bits=12, **fields):
    values = {"loss": 0.7 / step, "learning_rate": 1e-5 * step, "loss_scale": 1.0}
    widths = dict.fromkeys(STATES, bits)
    return {"event": "step", "step": step, "bits": widths, **values, **fields}


def eigenvalue_event(step):
    blocks = [
        {"name": name, "block": i, "iterations": 7, "converged": i > 0, "value": 4.0 / (i + 1)}
        for i, name in enumerate(LAYERS)
    ]
    for block in blocks:
        block |= {"normalized": block["value"] / 4.0, "factor": 1 + math.floor(block["value"])}
    return {"event": "eigenvalues", "step": step, "blocks": blocks}


def end_event(**fields):
    weights = {f"{name}.attention.self.query.weight": 0.004 for name in LAYERS}
    weights |= {"bert.embeddings.word_embeddings.weight": 0.0123, "classifier.weight": 0.001}
    size = {"numel": 1000, "bits": 8, "bytes_f32": 4_000_000, "bytes_quantized": 1_000_000}
    return {
        "event": "end",
        "finished": True,
        "quantization_error": weights,
        "quantized_sizes": dict.fromkeys(weights, size),
        "timings": {"forward": 3.0, "backward": 1.0},
        "memory_bytes": {"master weights": 12_300_000},
        **fields,
    }


def evaluate_event(step, **metrics):
    return {"event": "evaluate", "step": step, "metrics": metrics}


def finished_run():
    steps = [step_event(step, bits=12 - step // 5, tokens_per_second=8000) for step in range(1, 21)]
    evaluations = [evaluate_event(s, eval_accuracy=0.8 + s / 1000, eval_loss=0.5) for s in (10, 20)]
    return [
        start_event(),
        eigenvalue_event(5),
        eigenvalue_event(10),
        *steps,
        *evaluations,
        end_event(),
    ]


def write_log(folder, events):
    path = folder / "bitfall_log.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return folder


def report_text(folder, events):
    return write_report(write_log(folder, events)).read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Collects tags and attributes, and checks that tags are closed in order."""

    VOID = ("meta", "path")

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_finished_run_has_every_section(tmp_path):
    text = report_text(tmp_path, finished_run())
    for heading in (
        "Bits of every layer over time",
        "Eigenvalues",
        "Training",
        "Metrics",
        "Quantization error per layer",
        "Size",
        "Run",
    ):
        assert f"<h2>{heading}</h2>" in text
    assert "mrpc · mini-bert" in text
    assert "0.8200" in text  # final accuracy
    assert "20.0 MB" in text  # 5 weights of 4 MB
    assert "5.0 MB" in text
    assert "4.00 times smaller" in text
    assert "12.3 MB" in text  # memory
    assert "1.23%" in text  # error of the word embeddings
    assert "flag --learning_rate" in text
    assert "2 stopped at max_iter" in text  # block 0 of two computations
    assert "has not ended" not in text


def test_heat_map_shows_each_width_of_each_layer(tmp_path):
    text = report_text(tmp_path, finished_run())
    for name in STATES:
        assert f"{name}: 12 bits, steps 1 to 4" in text
        assert f"{name}: 8 bits, steps 20 to 20" in text


def test_page_is_well_formed_and_loads_nothing(tmp_path):
    text = report_text(tmp_path, finished_run())
    elements = Elements(text)
    assert elements.open == []
    assert not {"script", "link", "img", "iframe"} & set(elements.tags)
    assert not {"src", "href", "onclick"} & {name for name, _ in elements.attributes}
    assert "url(" not in text
    assert "http" not in text


def test_texts_of_the_log_are_escaped(tmp_path):
    attack = '<script>alert("1")</script>'
    events = [
        start_event(model={"path": attack}, task=attack, config={attack: attack}),
        {**step_event(1), "bits": {attack: 8}},
        {
            "event": "eigenvalues",
            "step": 1,
            "blocks": [{"name": attack, "normalized": 1, "value": 2}],
        },
        evaluate_event(1, **{attack: attack}),
        end_event(quantization_error={attack: 0.1}, timings={attack: 1.0}),
    ]
    text = report_text(tmp_path, events)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert Elements(text).open == []


def test_unfinished_run_says_so(tmp_path):
    events = [start_event(), *(step_event(step) for step in range(1, 8))]
    text = report_text(tmp_path, events)
    assert "This run has not ended: the log stops at step 7." in text
    assert "<h2>Bits of every layer over time</h2>" in text
    assert "<h2>Size</h2>" not in text


def test_interrupted_run_says_so(tmp_path):
    text = report_text(tmp_path, [start_event(), step_event(1), end_event(finished=False)])
    assert "has not ended" in text


def test_cut_last_line_is_tolerated(tmp_path):
    write_log(tmp_path, [start_event(), step_event(1)])
    with (tmp_path / "bitfall_log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "st')
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "The last line of the log (line 3) was cut off." in text


def test_repeated_steps_replace_the_first_version(tmp_path):
    first = [step_event(step, bits=12) for step in range(1, 11)]
    again = [step_event(step, bits=9) for step in range(6, 9)]
    resume = {"event": "resume", "step": 5, "checkpoint": "checkpoint-5"}
    log = read_log(write_log(tmp_path, [start_event(), *first, resume, *again]))
    assert [step["step"] for step in log.steps] == list(range(1, 9))
    assert log.bit_runs("other") == [(12, 1, 5), (9, 6, 8)]
    assert "Resumed from checkpoint-5" in log.notes[0]


def test_two_evaluation_sets_keep_their_names(tmp_path):
    events = [start_event(), step_event(1)]
    events += [
        {**evaluate_event(1, eval_accuracy=a), "name": n} for n, a in (("mnli", 0.8), ("mm", 0.7))
    ]
    text = report_text(tmp_path, [*events, end_event()])
    assert "eval_accuracy (mnli)" in text
    assert "eval_accuracy (mm)" in text
    assert text.count("<th>step 1</th>") == 1


def test_missing_and_odd_numbers_do_not_break_the_page(tmp_path):
    events = [
        start_event(config='{"seed": 1}'),
        step_event(1, loss=None, grad_norm=None),
        step_event(2, loss=None, learning_rate=0.0),
        eigenvalue_event(2),
        {
            "event": "eigenvalues",
            "step": 2,
            "blocks": [{"name": "x", "normalized": None, "value": 0}],
        },
        evaluate_event(2, eval_accuracy=None),
        end_event(quantization_error={"a": 0.0}, quantized_sizes={"a": {"numel": 1}}),
    ]
    assert Elements(report_text(tmp_path, events)).open == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{garbage", "bitfall_log.jsonl:2: not JSON"),
        ("[1, 2]", 'bitfall_log.jsonl:2: expected an object with "event"'),
        ('{"event": "dance"}', 'bitfall_log.jsonl:2: unknown event "dance"'),
        ('{"event": "step", "bits": {}}', '2: "step" of a step event: expected int, saw None'),
        ('{"event": "step", "step": true, "bits": {}}', "expected int, saw True"),
        ('{"event": "step", "step": 1, "bits": 8}', '"bits" of a step event: expected dict'),
        ('{"event": "eigenvalues", "step": 1, "blocks": [1]}', 'needs a "name"'),
        ('{"event": "evaluate", "step": 1}', '"metrics" of a evaluate event: expected dict'),
    ],
)
def test_garbage_names_file_and_line(tmp_path, line, message):
    lines = [json.dumps(start_event()), line, json.dumps(step_event(2))]
    (tmp_path / "bitfall_log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as error:
        write_report(tmp_path)
    assert message in str(error.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00"])
def test_empty_or_binary_log_is_refused(tmp_path, content):
    (tmp_path / "bitfall_log.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"bitfall_log\.jsonl"):
        write_report(tmp_path)


def test_command_without_log_fails_with_one_message(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "bitfall_log.jsonl: no such file" in error
    assert error.count("\n") == 1


def test_command_prints_the_path(tmp_path, capsys):
    write_log(tmp_path, finished_run())
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


def test_long_run_of_a_deep_model_stays_small(tmp_path):
    names = [f"bert.encoder.layer.{i}" for i in range(24)]
    steps = [
        {
            **step_event(step, loss=1 + math.sin(step), grad_norm=2 + math.cos(step)),
            "bits": dict.fromkeys(names, 12 - step // 2500),
        }
        for step in range(1, 10001)
    ]
    path = write_report(write_log(tmp_path, [start_event(), *steps, end_event()]))
    assert path.stat().st_size < 400_000


def test_thin_keeps_peaks():
    points = [(float(x), 0.0) for x in range(10_000)]
    points[7777] = (7777.0, 5.0)
    kept = thin(points)
    assert len(kept) <= 800
    assert (7777.0, 5.0) in kept
    assert kept == sorted(kept)


def test_smooth_of_a_constant_is_the_constant():
    assert all(math.isclose(y, 3.0) for _, y in smooth([(x, 3.0) for x in range(500)]))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.13, 0.98), (5, 5), (0, 0), (-3, 1e6), (2e-8, 3e-8)]
)
def test_linear_axis_encloses_the_values(low, high):
    axis = linear_axis(low, high)
    assert axis.low <= low <= high <= axis.high
    assert 2 <= len(axis.ticks) <= 7
    assert all(0 <= axis.share(tick) <= 1 for tick in axis.ticks)


def test_log_axis_encloses_the_values():
    axis = log_axis(0.02, 350.0)
    assert (axis.low, axis.high) == (0.01, 1000.0)
    assert axis.share(0.01) == 0
    assert math.isclose(axis.share(1.0), 0.4)


@pytest.mark.parametrize("last_step", [0, 1, 7, 200, 556, 100_000])
def test_doubling_axis_has_few_ticks_inside(last_step):
    axis = doubling_axis(last_step)
    assert len(axis.ticks) <= 12
    assert all(0 <= axis.share(tick) <= 1 for tick in axis.ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12, "12"),
        (1234567, "1.23e6"),
        (2e-5, "2e-5"),
        (0.25, "0.25"),
        (0.123456, "0.1235"),
    ],
)
def test_number(value, text):
    assert number(value) == text
