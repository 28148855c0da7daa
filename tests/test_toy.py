"""The toy world: its judge, its files, and that training on it does what the README says."""

import importlib
import itertools
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch
import yaml
from launch import Fork
from test_scripts_match import SCRIPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

import common

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"
sys.path.insert(0, str(TOY))
import judge  # noqa: E402
import make  # noqa: E402
import score  # noqa: E402

FRUITS = "Name 3 fruits."
SORTED = "Can you give me three fruits in alphabetical order?"
WITHOUT = "List three fruits but not fig, please."


@pytest.mark.parametrize(
    "request_, response, expected",
    [
        (FRUITS, "plum, fig and kiwi.", 4),
        (FRUITS, "Sure: plum, fig and kiwi.", 4),
        (FRUITS, "Here are 3 fruits: plum, fig and kiwi.", 4),
        (FRUITS, "Here are three fruits: plum, fig and kiwi.", 4),
        (FRUITS, "Here are 4 fruits: plum, fig and kiwi.", 3),
        (FRUITS, "Here are 3 metals: plum, fig and kiwi.", 3),
        (FRUITS, "plum, fig and saw.", 3),
        (FRUITS, "plum, fig and plum.", 3),
        (FRUITS, "plum and kiwi.", 3),
        (FRUITS, "plum, fig, lime, pear and kiwi.", 2),
        (FRUITS, "saw, drill and file.", 1),
        (FRUITS, "plum, fig and kiwi", 2),  # no full stop: the list cannot be read
        (FRUITS, "plum fig kiwi", 2),
        (FRUITS, "plum and fig and kiwi.", 2),
        (FRUITS, "plum.", 0),  # two for the form, two for the number
        (FRUITS, "plum, fig and kiwi. I", 3),
        (FRUITS, "plum, fig and kiwi. I like them.", 3),
        (FRUITS, "plum, fig and kiwi. I like them all.", 2),  # four words and a mark
        (FRUITS, "I do not know any fruits.", 0),
        (FRUITS, "", 0),
        (FRUITS, "Sure: ", 0),
        (SORTED, "fig, kiwi and plum.", 4),
        (SORTED, "plum, fig and kiwi.", 3),
        (WITHOUT, "plum, kiwi and pear.", 4),
        (WITHOUT, "plum, fig and kiwi.", 3),
    ],
)
def test_a_grade_is_four_less_the_faults(request_, response, expected):
    assert judge.grade(request_, response) == expected
    assert judge.grade([{"role": "user", "content": request_}], response) == expected


@pytest.mark.parametrize(
    "response",
    [
        "plum, " * 40,
        "plum and " * 40,
        ", " * 40,
        ". " * 40,
        "plum, fig and kiwi." * 12,
        "plum, fig and kiwi. and kiwi. and kiwi. and 3 more. do you think think think think think",
        "plum, fig and kiwi" + "." * 40,
        "plum, fig and kiwi. " + "Sure: " * 10,
        "Sure: " * 40 + "plum, fig and kiwi.",
        "fruits " * 40,
        "plum, fig, " + "kiwi, " * 20 + "lime and pear.",
        "<|im_start|> " * 40,
    ],
)
def test_degenerate_text_is_at_the_bottom(response):
    assert judge.grade(FRUITS, response) == 0


def test_the_judge_prefers_the_higher_grade():
    prompt = [{"role": "user", "content": FRUITS}]
    good, better, best = "saw, drill and kiwi.", "plum, fig and saw.", "plum, fig and kiwi."
    assert judge.judge(prompt, best, good) == "a" and judge.judge(prompt, good, better) == "b"
    assert judge.judge(prompt, "plum, fig and lime.", best) == "tie"


def test_other_requests_are_refused():
    with pytest.raises(ValueError, match="no request of the toy world"):
        judge.grade("Write a poem.", "plum, fig and kiwi.")


def rows_of(split, name):
    if name == "sft":
        return pyarrow.parquet.read_table(TOY / f"data/{split}_sft.parquet").to_pylist()
    text = (TOY / f"data/{split}_{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_make_gives_the_shipped_files_again(tmp_path):
    run("toy/make.py", tmp_path)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    folders = TOY / "model", TOY / "data"
    shipped = {path.relative_to(TOY) for folder in folders for path in folder.iterdir()}
    assert made == shipped
    for path in made:
        if path.suffix == ".parquet":  # its bytes depend on the version of pyarrow
            tables = [pyarrow.parquet.read_table(folder / path) for folder in (tmp_path, TOY)]
            assert tables[0].equals(tables[1])
        elif path.name == "config.json":  # it names the version of transformers
            configs = [json.loads((folder / path).read_text()) for folder in (tmp_path, TOY)]
            configs = [config | {"transformers_version": 0} for config in configs]
            assert configs[0] == configs[1]
        else:
            assert (tmp_path / path).read_bytes() == (TOY / path).read_bytes(), path


def test_the_world_is_small():
    assert sum(path.stat().st_size for path in TOY.rglob("*") if path.suffix != ".pyc") < 6e6


def test_chosen_answers_are_good_and_rejected_ones_are_not():
    for split in ("train", "test"):
        for row in rows_of(split, "prefs"):
            assert judge.grade(row["prompt"], row["chosen"][0]["content"]) == 4
            assert judge.grade(row["prompt"], row["rejected"][0]["content"]) < 4
        for row in rows_of(split, "unpaired"):
            grade = judge.grade(row["prompt"], row["completion"][0]["content"])
            assert (grade == 4) == row["label"]
        chats = [row["messages"] for row in rows_of(split, "sft")]
        good = sum(judge.grade(messages[:1], messages[1]["content"]) == 4 for messages in chats)
        assert 0.58 < good / len(chats) < 0.72
    rejected = [
        judge.grade(row["prompt"], row["rejected"][0]["content"])
        for row in rows_of("train", "prefs")
    ]
    # graded, not only bad
    assert all(rejected.count(value) > 0.1 * len(rejected) for value in range(4))


def combination(request_):
    number, category, *_ = judge.REQUEST.search(request_).groups()
    return category, judge.number(number)


def test_held_out_combinations_are_in_no_training_file():
    seen, unseen = set(), set()
    for name, split in itertools.product(("sft", "prefs", "unpaired"), ("train", "test")):
        for row in rows_of(split, name):
            request_ = row["prompt"] if "prompt" in row else row["messages"][0]["content"]
            (seen if split == "train" else unseen).add(combination(request_))
    assert len(seen) == 16 and not seen & unseen
    assert sorted(number for _, number in unseen) == [2, 2, 3, 3, 4, 4, 5, 5]
    # The words of a category are known from its other requests.
    assert {category for category, _ in seen} == judge.CATEGORIES.keys()


def test_every_text_of_the_world_round_trips():
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    rng = random.Random(0)
    for _ in range(2000):
        asked, text = make.request(rng, [*itertools.product(judge.CATEGORIES, judge.NUMBERS)])
        for text in (text, make.right_answer(rng, asked), make.flawed_answer(rng, asked)):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text


def test_words_belong_to_one_category():
    words = [word for words in judge.CATEGORIES.values() for word in words]
    assert len(words) == len(set(words)) == 96


def test_the_standard_error_is_that_of_the_mean():
    # deviations of 1/2 from the mean: sqrt(4 * 1/4 / 3) / sqrt(4)
    assert score.standard_error(torch.tensor([0.0, 1, 0, 1])) == pytest.approx(math.sqrt(1 / 3) / 2)


def test_the_figures_of_a_model_that_knows_nothing(tmp_path):
    """All logits are 0: each of the 170 tokens is as likely, at each of the 48 places."""
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(TOY / "sft")
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    model.save_pretrained(tmp_path)
    size = len(tokenizer)
    start, _ = score.open_network(tmp_path)
    requests = score.held_out_requests(64)
    figures, shares, examples = score.score(tmp_path, requests, 8, 0, start)
    assert figures["kl"] == 0 and figures["grades"] == [512, 0, 0, 0, 0]
    assert figures["entropy"] == pytest.approx(math.log(size), abs=1e-6)
    assert figures["good"] == figures["distinct"] == 0 and len(shares) == len(examples) == 64
    # 512 answers: an end token has the chance 1 / size at each place
    assert figures["endless"] == pytest.approx((1 - 1 / size) ** 48, abs=0.06)
    mean_length = (1 - (1 - 1 / size) ** 48) * size
    assert figures["length"] == pytest.approx(mean_length, abs=2)


def test_padding_does_not_change_what_is_sampled():
    """Requests differ in length, and each answer has random numbers of its own."""
    requests = ["Name 2 fruits.", "Can you give me 5 fruits in alphabetical order?"]
    model = score.open_network(TOY / "sft")
    together = score.answers(*model, requests, 2, seed=0, title="")
    apart = [score.answers(*model, [request], 2, seed=0, title="") for request in requests]
    assert [x["response"] for x in together] == [x["response"] for part in apart for x in part]
    assert len({x["response"] for x in together}) == 4


def test_the_shipped_checkpoint_is_that_of_the_recipe():
    recipe = yaml.safe_load((ROOT / "recipes/toy.yaml").read_text())
    shared = {key: value for key, value in recipe.items() if not isinstance(value, dict)}
    used = yaml.safe_load((TOY / "sft/config.yaml").read_text())
    assert used.items() >= (shared | recipe["sft"]).items()


@pytest.mark.parametrize("script", [*SCRIPTS, "eval_judge", "sample_pairs"])
def test_the_recipe_has_a_section_for_every_script(script, monkeypatch):
    monkeypatch.setattr("sys.argv", [f"{script}.py", "--config", str(ROOT / "recipes/toy.yaml")])
    args = common.parse_args(importlib.import_module(script).Args)
    assert args.output_dir == f"runs/toy/{script.split('.')[-1]}" and args.dataset == "toy/data"


def run(*words):
    """What a command from the root prints."""
    with Fork([sys.executable, *map(str, words)], cwd=ROOT) as process:
        assert process.wait() == 0, process.stderr[-2000:]
        return process.stdout


def test_kl_divergence_by_hand():
    """Of (1/2, 1/2) from (1/4, 3/4) at each token of two answers, of three tokens and of one."""

    class Network:
        device = "cpu"

        def __init__(self, *probabilities):
            self.logits = torch.tensor(probabilities).log()

        def __call__(self, ids):
            return SimpleNamespace(logits=self.logits.expand(*ids.shape, 2))

    rows = [(2, [0, 1, 0, 0, 1]), (3, [1, 1, 0, 1])]
    found = score.kl_divergence(Network(0.5, 0.5), Network(0.25, 0.75), rows)
    of_a_token = (math.log(0.5 / 0.25) + math.log(0.5 / 0.75)) / 2
    assert found == pytest.approx((3 + 1) * of_a_token / 2, rel=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The model of the README's first command, by an interpreter of its own as there."""
    out = tmp_path_factory.mktemp("toy") / "spo"
    line = [sys.executable, "spo.py", "--config", "recipes/toy.yaml", "--output_dir", out]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "curves.png").stat().st_size > 5000
    return out


def test_spo_improves_the_model(trained, tmp_path):
    printed = run("toy/score.py", "toy/sft", trained, "--json", tmp_path / "scores.json")
    before, after = json.loads((tmp_path / "scores.json").read_text())
    assert 0.4 < before["good"] < 0.6
    assert after["gain"] > max(0.15, 3 * after["gain_se"])
    assert after["gain"] == pytest.approx(after["good"] - before["good"])
    # no gain by copies, by one word more often, or by length
    assert after["distinct"] > 0.9 and after["endless"] < 0.01
    assert 0.8 < after["length"] / before["length"] < 1.2
    assert after["entropy"] > 0.7 * before["entropy"]
    assert before["kl"] == 0 and 0.1 < after["kl"] < 2  # it stays near its start
    assert sum(after["grades"]) == 1024 and after["grades"][4] == 1024 * after["good"]
    assert len(re.findall(r"^.*spo +\d of 4  ", printed, re.M)) == 4  # sample answers


def test_eval_judge_sees_the_improvement(trained, tmp_path):
    names = "--models", "sft=toy/sft", f"spo={trained}"
    printed = run("eval_judge.py", "--config", "recipes/toy.yaml", "--output_dir", tmp_path, *names)
    cell = json.loads((tmp_path / "report.json").read_text())["matrix"]["spo"]["sft"]
    assert cell["n"] == 200 and cell["low"] > 55 and cell["significant"]
    assert cell["length_controlled"] > 55
    assert f"| spo | {cell['win_rate']:.1f} ± {cell['standard_error']:.1f} [" in printed
