"""Tokenization, packing, the order of the data, and own files."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bitfall.arguments import GlueArguments
from bitfall.batches import BatchPlan
from bitfall.data import TokenizedData, tokenize
from bitfall.errors import DataError
from bitfall.outputs import read_json_object
from bitfall.problem import label_order, load_problem
from bitfall.readers import Examples
from bitfall.tokenization import TextEncoder
from conftest import SPECIAL, TINY_CONFIG, WORDS, Alone

CLS, SEP, UNK = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]"), SPECIAL.index("[UNK]")


def word(text: str) -> int:
    return len(SPECIAL) + WORDS.index(text)


def test_vocabulary_file_and_pairs(tiny_model_dir: Path, alone):
    encoder = TextEncoder(tiny_model_dir, TINY_CONFIG, 16)
    examples = Examples(["The film", "bad"], ["was GOOD", "zebra"], [1, 0])
    data = tokenize(examples, encoder, alone, is_regression=False)
    batch = data.batch([1, 0], [5, 6])
    second = [CLS, word("bad"), SEP, UNK, SEP]
    first = [CLS, word("the"), word("film"), SEP, word("was"), word("good"), SEP]
    assert batch["input_ids"].tolist() == second + first
    assert batch["token_type_ids"].tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert batch["sequence_starts"].tolist() == [0, 5, 12]
    assert batch["sample_keys"].tolist() == [5, 6]
    assert batch["labels"].tolist() == [0, 1]
    assert batch["labels"].dtype == np.int32
    assert batch["input_ids"].dtype == np.int32


def test_truncation_takes_from_the_longest(tiny_model_dir: Path, alone):
    encoder = TextEncoder(tiny_model_dir, TINY_CONFIG, 8)
    examples = Examples(["the film was very very good"], ["the play"], None)
    data = tokenize(examples, encoder, alone, is_regression=False)
    assert data.starts.tolist() == [0, 8]
    assert data.input_ids.tolist()[-3:] == [word("the"), word("play"), SEP]
    assert "labels" not in data.batch([0], [0])


def test_limits_and_misfits(tiny_model_dir: Path, tmp_path: Path):
    with pytest.warns(UserWarning, match="above the model's limit: using 32"):
        assert TextEncoder(tiny_model_dir, TINY_CONFIG, 128).max_seq_length == 32
    for vocab_size in (20, 1024):
        with pytest.raises(DataError, match=f"vocab_size is {vocab_size}"):
            TextEncoder(tiny_model_dir, TINY_CONFIG | {"vocab_size": vocab_size}, 16)
    TextEncoder(tiny_model_dir, TINY_CONFIG | {"vocab_size": 128}, 16)  # padded
    with pytest.raises(DataError, match="neither tokenizer"):
        TextEncoder(tmp_path, TINY_CONFIG, 16)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a tokenizer"):
        TextEncoder(tmp_path, TINY_CONFIG, 16)
    with pytest.raises(DataError, match="vocab_size is None, expected a positive integer"):
        TextEncoder(tiny_model_dir, {}, 16)
    single = TextEncoder(tiny_model_dir, TINY_CONFIG | {"type_vocab_size": 1}, 16)
    with pytest.raises(DataError, match="pairs"):
        single.encode(["a"], ["b"])


def test_tokenizer_file_equals_vocabulary_file(minilm_dir: Path, tmp_path: Path):
    config = read_json_object(minilm_dir / "config.json")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((minilm_dir / name).read_bytes())
    texts = ["Été: naïve 東京 don't!", "x" * 300, "a " * 300, ""]
    other = ["b", "c " * 200, "d " * 200, "e"]
    encodings = [
        TextEncoder(folder, config, 128).encode(texts, other) for folder in (minilm_dir, tmp_path)
    ]
    for fast, slow in zip(*encodings, strict=True):
        assert fast.ids == slow.ids
        assert fast.type_ids == slow.type_ids
        assert len(fast.ids) <= 128


class Rank:
    """One rank of several, each in a thread of its own."""

    def __init__(self, rank: int, parts: list[bytes], barrier: threading.Barrier):
        self.rank, self.world_size, self._parts, self._barrier = rank, len(parts), parts, barrier

    def all_gather(self, data: bytes) -> list[bytes]:
        self._parts[self.rank] = data
        self._barrier.wait(timeout=30)
        return list(self._parts)


def test_ranks_tokenize_their_share_only(tiny_model_dir: Path, alone):
    encoder = TextEncoder(tiny_model_dir, TINY_CONFIG, 16)
    examples = Examples(["good"] * 3 + ["a very bad film"] * 4, None, [0.5] * 7)
    whole = tokenize(examples, encoder, alone, is_regression=True)
    parts, barrier, seen = [b""] * 3, threading.Barrier(3), {}

    def run(rank: int) -> TokenizedData:
        class Counting:
            def encode(self, first, second):
                seen[rank] = seen.get(rank, 0) + len(first)
                return encoder.encode(first, second)

        return tokenize(examples, Counting(), Rank(rank, parts, barrier), is_regression=True)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(run, range(3)))
    assert seen == {0: 2, 1: 2, 2: 3}
    for together in results:
        assert together.input_ids.tolist() == whole.input_ids.tolist()
        assert together.starts.tolist() == whole.starts.tolist()
        assert together.labels.dtype == np.float32


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_every_global_batch(world_size: int):
    plan = BatchPlan(num_examples=50, train_batch_size=12, micro_batch_size=4, seed=9)
    order = plan.order(2)
    assert sorted(order) == list(range(50))
    assert plan.steps_per_epoch == 5
    for step in range(5):
        examples, keys = [], []
        for rank in range(world_size):
            for indices, sample_keys in plan.micro_batches(order, step, rank, world_size):
                assert 1 <= len(indices) <= 4
                examples += indices.tolist()
                keys += list(sample_keys)
        assert examples == order[step * 12 : step * 12 + 12].tolist()
        assert keys == list(range(len(examples)))


def test_order_depends_on_seed_and_epoch_only():
    plan = BatchPlan(1000, 8, 8, 1)
    assert plan.order(0).tolist() == BatchPlan(1000, 32, 4, 1).order(0).tolist()
    assert plan.order(0).tolist() != plan.order(1).tolist()
    assert plan.order(0).tolist() != BatchPlan(1000, 8, 8, 2).order(0).tolist()
    assert BatchPlan(6, 2, 2, 42).order(0).tolist() == [1, 4, 3, 5, 0, 2]  # for ever


def test_total_steps_as_in_hugging_face():
    plan = BatchPlan(3668, 32, 32, 0)
    assert plan.total_steps(3, -1) == 345
    assert plan.total_steps(0.5, -1) == 58
    assert plan.total_steps(3, 10) == 10


def test_batch_of_real_sizes_packs_every_token():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 60, 100)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.arange(starts[-1], dtype=np.int32)
    data = TokenizedData(ids, ids % 2, starts, None)
    chosen = generator.permutation(100)[:32]
    batch = data.batch(chosen, range(32))
    expected = np.concatenate([ids[starts[i] : starts[i + 1]] for i in chosen])
    assert np.array_equal(batch["input_ids"], expected)
    assert np.array_equal(batch["token_type_ids"], expected % 2)


def own(tmp_path: Path, train: str, dev: str, suffix: str = ".csv"):
    files = {}
    for name, text in (("train", train), ("validation", dev)):
        path = tmp_path / f"{name}{suffix}"
        path.write_text(text)
        files[f"{name}_file"] = str(path)
    arguments = GlueArguments(do_train=True, do_eval=True, max_train_samples=3, **files)
    return load_problem(arguments, {}, Alone())


def test_own_files_sorted_labels(tmp_path: Path):
    problem = own(tmp_path, "text,label\na,yes\nb,no\nc,yes\nd,no\n", "text,label\nx,no\n")
    assert problem.labels == ("no", "yes")
    assert problem.metrics == ("accuracy",)
    assert problem.splits["train"]["custom"].labels == [1, 0, 1]
    assert problem.splits["dev"]["custom"].labels == [0]


def test_own_files_integers_sort_as_numbers(tmp_path: Path):
    problem = own(tmp_path, "text,label\na,10\nb,2\n", "text,label\nx,10\n")
    assert problem.labels == ("2", "10")
    assert problem.splits["dev"]["custom"].labels == [1]


def test_own_files_floats_are_regression(tmp_path: Path):
    train = '{"sentence2": "b", "label": 1.5, "id": "0", "sentence1": "a"}\n'
    problem = own(tmp_path, train, train.replace("1.5", "2"), ".json")
    assert problem.is_regression
    assert problem.metrics == ("mse",)
    examples = problem.splits["dev"]["custom"]
    assert (examples.first, examples.second, examples.labels) == (["a"], ["b"], [2.0])


TWO_LABELS = "text,label\na,yes\nb,no\n"


@pytest.mark.parametrize(
    ("train", "dev", "message"),
    [
        (TWO_LABELS, "text,label\nx,maybe\n", "label 'maybe' is not one of the training"),
        (TWO_LABELS, "text\nx\n", "column 'label' is missing"),
        (TWO_LABELS, "other,label\nx,yes\n", "column 'text' of the training file"),
        ("text,label\na,1\nb,1\n", "text,label\nx,1\n", "every label is 1; expected two"),
        ("label\nyes\nno\n", "label\nyes\n", "no column with text"),
        ("text,label\na,\n", "text,label\nx,yes\n", "line 2: label ''"),
        ("text,label\na,0.5\nb,high\n", "text,label\nx,1\n", "mixes numbers and names"),
        ("text,label\na,0.5\n", "text,label\nx,high\n", "expected a number"),
    ],
)
def test_own_files_refusals(tmp_path: Path, train: str, dev: str, message: str):
    with pytest.raises(DataError, match=message):
        own(tmp_path, train, dev)


def test_label_order_of_the_model_is_kept():
    labels = ("entailment", "neutral", "contradiction")
    model = {"id2label": {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"}}
    assert label_order(labels, model) == ("contradiction", "neutral", "entailment")
    assert label_order(labels, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}) == labels
    assert label_order(labels, {"id2label": ["x"]}) == labels
    assert label_order(labels, {}) == labels


def test_task_labels_follow_the_model(glue_dir: Path):
    arguments = GlueArguments(task_name="rte", data_dir=str(glue_dir), do_eval=True)
    plain = load_problem(arguments, {}, Alone()).splits["dev"]["rte"].labels
    swapped = {"id2label": json.loads('{"0": "not_entailment", "1": "entailment"}')}
    other = load_problem(arguments, swapped, Alone())
    assert other.labels == ("not_entailment", "entailment")
    assert other.splits["dev"]["rte"].labels == [1 - label for label in plain]
