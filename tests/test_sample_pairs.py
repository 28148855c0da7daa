"""sample_pairs.py: the choice of pairs, the rewards, the file that the training scripts read, and
runs that are killed or have two processes."""

import json
import time

import pyarrow.parquet
import pytest
import tiny
import torch
from launch import Fork, command, run
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

import data
import dpo
import eval_judge
import sample_pairs
from sample_pairs import Args, Example

RULE = """
def score(prompt, response):
    assert [turn["role"] for turn in prompt] == ["user"]
    return len(set(response)) // 4
def judge(prompt, a, b):
    return "tie" if len(a) == len(b) else "a" if len(a) > len(b) else "b"
"""


def settings(world, out, **others):
    shared = dict(model=f"{world}/llama", dataset=f"{world}/data", output_dir=str(out))
    shared |= dict(num_samples=3, num_prompts=10, temperature=1.0, generation_batch_size=4)
    return shared | dict(max_length=96, max_new_tokens=12) | others


@pytest.fixture(scope="module")
def rule(tmp_path_factory):
    path = tmp_path_factory.mktemp("rule") / "rule.py"
    path.write_text(RULE)
    return str(path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A random reward model."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(3)
    LlamaForSequenceClassification(LlamaConfig(**tiny.SIZES, num_labels=1)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def example(texts, scores=()):
    lines = [dict(response=text, tokens=len(text), cut=False) for text in texts]
    return Example("train_prefs", [tiny.turn("user", "?")], lines, list(scores))


def rows_of(out, split="train_prefs"):
    return pyarrow.parquet.read_table(f"{out}/{split}.parquet").to_pylist()


# ---- The choice ----
@pytest.mark.parametrize(
    ("scores", "chosen", "rejected"),
    [
        ([1.0, 3.0, 2.0], "b", "a"),
        ([-1.0, -3.0, -2.0], "a", "b"),
        ([2.0, 1.0, 2.0, 1.0], "a", "b"),  # the first of equal ones
        ([0.0, 1.0, 1.0, -0.5, -0.5], "b", "d"),
    ],
)
def test_the_best_answer_against_the_worst(scores, chosen, rejected):
    found = example("abcde"[: len(scores)], scores)
    assert sample_pairs.drop_reason(found, 0) == ""
    row = sample_pairs.row_of(found)
    assert row["prompt"] == [tiny.turn("user", "?")]
    assert row["chosen"] == [tiny.turn("assistant", chosen)]
    assert row["rejected"] == [tiny.turn("assistant", rejected)]
    assert row["answers"] == list("abcde"[: len(scores)]) and row["scores"] == scores


def test_prompts_without_a_pair():
    def reason(texts, scores, min_margin=0.0):
        return sample_pairs.drop_reason(example(texts, scores), min_margin)

    assert "fewer than two" in reason("a", [1.0])
    assert "score alike" in reason("abc", [2.0, 2.0, 2.0])
    assert "verdict is missing" in reason("ab", [])
    assert "margin below 1.5" in reason("abc", [1.0, 2.0, 1.5], 1.5)
    assert reason("abc", [1.0, 2.5, 2.0], 1.5) == ""


def test_blank_and_repeated_answers_are_left_out(world, tmp_path, monkeypatch):
    texts = iter(["b", "a", "b", " \n\u200b", "a", "c", "c", "c", "c", "c"])

    def generate(name, model, ids_of, args):
        return {key: dict(response=next(texts), tokens=1, cut=False) for key in ids_of}

    monkeypatch.setattr(eval_judge, "generate_missing", generate)
    args = Args(**settings(world, tmp_path, num_samples=5))
    examples = [example([]), example([])]
    examples[1].prompt = [tiny.turn("user", "another")]
    sample_pairs.sample(eval_judge.open_model(args.model), examples, args)
    answers = [[line["response"] for line in x.answers] for x in examples]
    assert answers == [["b", "a"], ["c"]]


def test_distributions_by_hand():
    rows = [example("a bbb cc".split(), [1.0, 0.0, 5.0]), example(["dddd", "e"], [2.0, 0.0])]
    found = sample_pairs.distributions([sample_pairs.row_of(x) for x in rows])
    assert found["scores"]["mean"] == pytest.approx(8 / 5)
    expected = {"mean": 3.5, "0%": 2, "5%": 2.15, "25%": 2.75, "50%": 3.5}
    assert found["margin"] == pytest.approx(expected | {"75%": 4.25, "95%": 4.85, "100%": 5})
    assert (found["tokens of chosen"]["0%"], found["tokens of chosen"]["100%"]) == (2, 4)
    assert (found["tokens of rejected"]["0%"], found["tokens of rejected"]["100%"]) == (1, 3)


# ---- Rewards ----
def test_scores_are_those_of_the_plain_forward(classifier):
    reward = sample_pairs.open_reward(Args(reward=classifier))
    network = LlamaForSequenceClassification.from_pretrained(classifier)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    found = set()
    for text in ("the quick fox", "tea", "a lazy dog jumps over"):
        chat = [tiny.turn("user", "wizards"), tiny.turn("assistant", text)]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            expected = network(**ids).logits
        assert expected.shape == (1, 1)
        found.add(reward.score(chat[:1], text))
        assert reward.score(chat[:1], text) == expected.item()
    assert len(found) == 3


@pytest.mark.parametrize(
    ("texts", "verdicts", "scores"),
    [
        (["a", "bb", "cc"], None, [0.0, 0.75, 0.75]),  # the rule: longer is better
        (["a", "bb", "ccc"], None, [0.0, 0.5, 1.0]),
        (["a", "bb", "ccc"], "a", [0.5, 0.5, 0.5]),  # a judge that looks at the place alone
        (["a"], None, [0.0]),
    ],
)
def test_a_round_robin_by_hand(tmp_path, rule, texts, verdicts, scores):
    args = Args(reward="judge", judge=rule, output_dir=str(tmp_path))
    judge = sample_pairs.open_reward(args)
    if verdicts:
        judge.judge = lambda prompt, a, b: verdicts
    found = example(texts)
    sample_pairs.score_by_judge(judge, [found], args)
    assert found.scores == scores
    asked = eval_judge.kept("verdicts", args)
    assert len(asked) == len(texts) * (len(texts) - 1)


def test_a_missing_verdict_leaves_out_its_prompt_alone(tmp_path, rule, capsys):
    args = Args(reward="judge", judge=rule, output_dir=str(tmp_path))
    judge = sample_pairs.open_reward(args)

    def answer(asks, record):
        for key, (_, a, b) in asks.items():
            record(key, {"error": "cut"} if "x" in (a, b) else {"verdict": "b"})

    judge.answer = answer
    examples = [example(["a", "x"]), example(["a", "b"])]
    sample_pairs.score_by_judge(judge, examples, args)
    assert [list(x.scores) for x in examples] == [[], [0.5, 0.5]]
    assert "2 verdicts are missing; run again" in capsys.readouterr().out


def refused(reward, capsys):
    with pytest.raises(SystemExit) as end:
        sample_pairs.open_reward(Args(reward=str(reward)))
    assert end.value.code == 2
    return capsys.readouterr().err


def test_reward_models_that_cannot_be_used_are_named(world, tmp_path, capsys):
    needed = "ArmoRM and PairRM are not"
    message = refused(f"{world}/llama", capsys)
    assert "it is LlamaForCausalLM" in message and needed in message and "Skywork" in message
    config = LlamaConfig(**tiny.SIZES, num_labels=1)
    config.architectures = ["LlamaForRewardModelWithGating"]
    config.auto_map = {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModel"}
    config.save_pretrained(tmp_path / "armo")
    message = refused(tmp_path / "armo", capsys)
    assert "it is LlamaForRewardModelWithGating" in message and needed in message
    config = LlamaConfig(**tiny.SIZES, num_labels=3)
    config.architectures = ["LlamaForSequenceClassification"]
    config.save_pretrained(tmp_path / "three")
    assert "it has 3 outputs" in refused(tmp_path / "three", capsys)
    (tmp_path / "rule.py").write_text("def judge(prompt, a, b): ...")
    assert "has no function score" in refused(tmp_path / "rule.py", capsys)
    with pytest.raises(ValueError, match="--output_dir"):
        Args(dataset=str(tmp_path), output_dir=f"{tmp_path}/rows/..")


def test_plain_text_is_refused_with_the_form_that_is_needed(monkeypatch, capsys):
    found = [[dict(role="text", content="where?")]], ""
    monkeypatch.setattr(eval_judge, "load_prompts", lambda *_: found)
    with pytest.raises(SystemExit):
        sample_pairs.load_prompts(None, "train_prefs", Args())
    said = capsys.readouterr().err
    assert "train_prefs has plain text" in said and '[{"role": "user", "content": "..."}]' in said


# ---- Whole runs ----
def test_the_training_scripts_read_the_pairs(world, tmp_path, rule):
    sample_pairs.main(Args(**settings(world, tmp_path, reward=rule)))
    tokenizer = AutoTokenizer.from_pretrained(f"{world}/llama")
    rows = rows_of(tmp_path)
    assert 0 < len(rows) <= 10 and rows_of(tmp_path, "test_prefs")
    args = dpo.Args(dataset=str(tmp_path), max_length=200)
    split, summary = data.tokenize("train_prefs", data.encode_pair, tokenizer, args)
    assert summary.endswith(f"{len(rows)} rows: {len(rows)} kept"), summary
    for row, encoded in zip(rows, split.rows, strict=True):
        assert row["messages"] == row["prompt"] + row["chosen"]
        for side, response in zip(("chosen", "rejected"), encoded["responses"], strict=True):
            (question,), (answer,) = row["prompt"], row[side]
            text = f"<|im_start|>user\n{question['content']}<|im_end|>\n<|im_start|>assistant\n"
            text += f"{answer['content']}<|im_end|>"
            assert encoded["prompt"] + response == tokenizer(text)["input_ids"]
        best, worst = max(row["scores"]), min(row["scores"])
        scores = dict(zip(row["answers"], row["scores"], strict=True))
        assert scores[row["chosen"][0]["content"]] == best > worst
        assert scores[row["rejected"][0]["content"]] == worst
        assert row["scores"] == [len(set(text)) // 4 for text in row["answers"]]
    for encode in (data.encode_unpaired, data.encode_chat):  # KTO and SFT
        split, _ = data.tokenize("train_prefs", encode, tokenizer, args)
        assert len(split) == len(rows) * (2 if encode is data.encode_unpaired else 1)
    metadata = pyarrow.parquet.read_schema(tmp_path / "train_prefs.parquet").metadata
    made_by = json.loads(metadata[b"sample_pairs"])
    assert made_by["settings"]["reward"] == rule and made_by["settings"]["num_samples"] == 3
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["train_prefs"]["prompts"] == 10 and report["reward"] == made_by["reward"]
    counts = report["train_prefs"]["counts"]
    assert counts["pairs"] == len(rows) and counts["answers"] == 30 >= counts["different answers"]


def test_more_samples_are_added_and_one_file_has_no_held_out_split(
    world, tmp_path, rule, monkeypatch
):
    generate, sampled = eval_judge.generate, []
    counted = lambda *a: sampled.extend(a[2]) or generate(*a)  # noqa: E731
    monkeypatch.setattr(eval_judge, "generate", counted)
    one_file = dict(dataset=f"{world}/data/test_prefs.jsonl", reward=rule, num_prompts=0)
    one_file |= dict(generation_batch_size=64)
    sample_pairs.main(Args(**settings(world, tmp_path, **one_file)))
    assert len(sampled) == 120  # all of its 40 prompts
    assert not (tmp_path / "test_prefs.parquet").exists()
    before = {tuple(map(str, row["prompt"])): row["answers"] for row in rows_of(tmp_path)}
    sample_pairs.main(Args(**settings(world, tmp_path, **one_file, num_samples=4)))
    assert len(sampled) == len(set(sampled)) == 160
    after = {tuple(map(str, row["prompt"])): row["answers"] for row in rows_of(tmp_path)}
    assert before.keys() <= after.keys()
    assert all(after[prompt][: len(texts)] == texts for prompt, texts in before.items())


def test_a_killed_run_goes_on_and_samples_nothing_twice(world, tmp_path, rule, monkeypatch):
    args = settings(world, tmp_path / "killed", reward=rule, num_prompts=20, eval_split="")
    journal = tmp_path / "killed/responses.0.jsonl"
    with Fork(command("sample_pairs.py", args)) as process:
        while not journal.exists() or len(journal.read_text().splitlines()) < 8:
            assert process.poll() is None, process.stdout + process.stderr
            time.sleep(0.002)
    text = journal.read_text()
    journal.write_text(text[:-9])  # cut off in its last line
    recorded = {json.loads(line)["key"] for line in text.splitlines()[:-1]}
    assert 7 <= len(recorded) < 60 and not (tmp_path / "killed/train_prefs.parquet").exists()
    generate, sampled = eval_judge.generate, []
    counted = lambda *a: sampled.extend(a[2]) or generate(*a)  # noqa: E731
    monkeypatch.setattr(eval_judge, "generate", counted)
    sample_pairs.main(Args(**args))
    assert not recorded & set(sampled) and len(sampled) == 60 - len(recorded)
    keys = [json.loads(line)["key"] for line in journal.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 60
    sampled.clear()
    sample_pairs.main(Args(**args))
    assert not sampled
    sample_pairs.main(Args(**args | dict(output_dir=str(tmp_path / "whole"))))
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


def test_two_processes_make_the_pairs_of_one(world, tmp_path, classifier):
    args = settings(world, tmp_path / "two", reward=classifier, num_prompts=5)
    done = run("sample_pairs.py", args, processes=2, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for kind in ("responses", "scores"):  # 3 for each of 5 prompts of both splits
        shares = [len(open(tmp_path / f"two/{kind}.{i}.jsonl").readlines()) for i in (0, 1)]
        assert abs(shares[0] - shares[1]) <= 1 and sum(shares) == 30
    sample_pairs.main(Args(**args | dict(output_dir=str(tmp_path / "one"))))
    for split in ("train_prefs", "test_prefs"):
        assert rows_of(tmp_path / "two", split) == rows_of(tmp_path / "one", split)
