"""Evaluation: answers, prompts and labels that come as files of others."""

import json
import shutil

import numpy as np
import pytest
import tiny
from judging import by_rule, completion, endpoint, evaluate, journal, settings
from transformers import AutoTokenizer

import chat
import eval_files
import eval_judge
import eval_report

pytest_plugins = ["judging"]


def write(path, rows):
    """A .json file with a list, or a .jsonl file with a line for each row."""
    lines = "\n".join(map(json.dumps, rows))
    path.write_text(json.dumps(rows) if path.suffix == ".json" else lines + "\n")
    return str(path)


def arena_hard(asked, answer):
    """A row of its model_answer at commit bed1604."""
    messages = [tiny.turn("user", asked), tiny.turn("assistant", {"answer": answer})]
    return dict(uid="0253f09025cc40cd", ans_id="dgYC", model="x", messages=messages, metadata={})


def test_answers_of_others(tmp_path):
    """In AlpacaEval's form, in Arena-Hard's, and behind a byte order mark."""
    rows = [dict(dataset="koala", instruction=f"q{i}", output=f"r{i}") for i in range(2)]
    expected = {"q0": "r0", "q1": "r1"}
    assert eval_files.read_answers(write(tmp_path / "alpaca.json", rows)) == expected
    path = write(tmp_path / "arena.jsonl", [arena_hard(f"q{i}", f"r{i}") for i in range(2)])
    assert eval_files.read_answers(path) == expected
    (tmp_path / "mark.json").write_text("\ufeff" + json.dumps(rows))
    assert eval_files.read_answers(tmp_path / "mark.json") == expected


@pytest.mark.parametrize(
    "row, prompt",
    [
        (dict(instruction="q", output="r", generator="x"), "q"),  # AlpacaEval's
        (dict(question_id=81, category="writing", turns=["q", "and now?"]), "q"),  # MT-Bench's
        (dict(question_id="96d2", cluster="x", turns=[{"content": "q"}]), "q"),  # Arena-Hard v0.1's
        (dict(uid="02", category="hard_prompt", subcategory="coding", prompt="q"), "q"),  # v2.0's
        (dict(prompt="q"), "q"),
        (dict(messages=[tiny.turn("user", "q")]), "q"),
        (dict(messages=[tiny.turn("user", "q"), tiny.turn("assistant", "r")]), "q"),
        (dict(prompt=None, messages=[tiny.turn("user", "q")], turns=None), "q"),
        (dict(instruction="q", input="text", output="r"), "q\ntext"),  # Alpaca's
        (dict(instruction="q", chosen="r", rejected="s"), "q"),
    ],
)
def test_prompts_of_benchmarks(row, prompt):
    assert eval_files.prompt_of(row) == [tiny.turn("user", prompt)]


def test_plain_strings_become_messages_as_in_training():
    row = dict(prompt="q", system="s", chosen="r", rejected="x")
    turns = [tiny.turn("system", "s"), tiny.turn("user", "q")]
    assert eval_files.prompt_of(row, apply_chat_template=True) == turns
    assert eval_files.prompt_of(dict(prompt="q", chosen="r"))[0]["role"] == chat.TEXT


def test_prompts_are_read_from_a_benchmarks_file(models, world, tmp_path):
    rows = [dict(question_id=i, turns=[f"the fox {i}", "and now?"]) for i in range(5)]
    path = write(tmp_path / "question.jsonl", rows)
    contestants = {"m": eval_judge.open_model(f"{models}/m0")}
    args = eval_judge.Args(**settings(world, models, tmp_path, dataset=path))
    prompts, _ = eval_judge.load_prompts(contestants, args)
    assert sorted(prompt[0]["content"] for prompt in prompts) == [f"the fox {i}" for i in range(5)]


def test_files_compete_with_models(world, models, generated, tmp_path, capsys):
    """A file has the answers of a model and one more for each prompt but three; another is this
    script's own export. The prompts are those of all, and the figures those of the texts."""
    export = json.loads((generated / "model_outputs/one.json").read_text())
    rows = [row | {"output": row["output"] + " every tea strong us"} for row in export[3:]]
    path = write(tmp_path / "longer.json", rows)
    own = generated / "arena_hard/model_answer/two.jsonl"
    names = [f"one={models}/m0", f"longer={path}", f"two={own}"]
    report = evaluate(world, models, tmp_path / "out", generated, models=names, num_prompts=30)
    assert "27 prompts; left out: 13 lacking in a file of --models" in capsys.readouterr().out
    before = evaluate(world, models, tmp_path / "models", generated, num_prompts=30)
    rates = {
        cell: report["matrix"][cell[0]][cell[1]] for cell in (("longer", "one"), ("one", "two"))
    }
    assert rates["longer", "one"]["win_rate"] > 70 and rates["longer", "one"]["n"] == 27
    kept = [row["output"] for row in export[3:]]
    found = before["matrix"]["one"]["two"]["verdicts"]
    expected = [both for both, row in zip(found, export, strict=True) if row["output"] in kept]
    assert rates["one", "two"]["verdicts"] == expected
    assert report["models"]["longer"]["tokens"] is None and report["models"]["one"]["tokens"] > 0
    assert len(journal(tmp_path / "out", "responses")) == len(journal(generated, "responses"))


def test_files_alone_need_no_model(world, models, generated, tmp_path):
    names = [f"{name}={generated}/model_outputs/{name}.json" for name in ("one", "two")]
    files = f"{generated}/model_outputs/one.json"  # as --dataset, its instructions are the prompts
    args = dict(models=names, dataset=files, num_prompts=30)
    report = evaluate(world, models, tmp_path / "files", **args)
    before = evaluate(world, models, tmp_path / "models", generated, num_prompts=30)
    rates = [x["matrix"]["one"]["two"]["win_rate"] for x in (report, before)]
    assert rates[0] == rates[1] and not list((tmp_path / "files").glob("responses*"))


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("x.json", "[1", "Expecting"),
        ("x.json", '{"instruction": "q", "output": "r"}', "a list of objects"),
        ("x.jsonl", '{"instruction": "q", "output": "r"}\n{"inst', "line 2 is no JSON"),
        (
            "x.jsonl",
            '{"question_id": "1", "choices": []}',
            "row 1: it needs the texts `instruction`",
        ),
        ("x.jsonl", '{"instruction": "q", "output": null}', "row 1: it needs the texts"),
        ("none.json", None, "No such file"),
    ],
)
def test_bad_files_are_one_line(world, models, tmp_path, capsys, name, text, message):
    if text:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as end:
        evaluate(world, models, tmp_path / "out", models=[f"a={tmp_path}/{name}", f"b={models}/m0"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and f"--models {tmp_path}/{name}" in error


# ---- Checking a judge ----
WIN, LOSS, TIE, FLIP = ["a", "b"], ["b", "a"], ["tie", "tie"], ["a", "a"]


def test_agreement_and_kappa_by_hand():
    """40 pairs: both say win 15 times and loss 15 times, and ten times one says win and the other
    loss. Agreement 3/4 where 1/2 is by chance: kappa 1/2. Its error, for even marginals, is twice
    that of the agreement, sqrt(3/16 / 40)."""
    found = [WIN] * 15 + [LOSS] * 15 + [WIN] * 5 + [LOSS] * 5
    labels = [WIN] * 15 + [LOSS] * 15 + [LOSS] * 5 + [WIN] * 5
    figures = eval_report.agreement(found, labels, seed=0)
    assert (figures["labelled"], figures["agreement_percent"], figures["kappa"]) == (40, 75, 0.5)
    error = (3 / 16 / 40) ** 0.5
    assert figures["agreement_se"] == pytest.approx(100 * error, rel=0.05)
    assert figures["kappa_se"] == pytest.approx(2 * error, rel=0.05)
    # Orders that disagree are a tie, a missing one is left out; one outcome alone has no kappa.
    figures = eval_report.agreement([FLIP, TIE, ["a", None]], [TIE, TIE, WIN], seed=0)
    assert (figures["labelled"], figures["agreement_percent"]) == (2, 100)
    assert figures["kappa"] is None and eval_report.agreement([], [], seed=0) == {}


def test_kappa_of_chance_is_zero_and_of_opposites_minus_one():
    chance = np.random.default_rng(0).integers(0, 3, (2, 3000))
    outcomes = [WIN, LOSS, TIE]
    found, labels = ([outcomes[i] for i in row] for row in chance)
    figures = eval_report.agreement(found, labels, seed=0)
    assert abs(figures["kappa"]) < 3 * figures["kappa_se"] < 0.06
    opposite = eval_report.agreement([WIN, LOSS] * 20, [LOSS, WIN] * 20, seed=0)
    assert opposite["kappa"] == -1 and opposite["agreement_percent"] == 0


def test_a_judge_is_checked_without_models(world, models, tmp_path, capsys):
    """The rule, which prefers more different words, says a, b, tie, a, and people a, b, tie, b: 3/4
    are the same, and by chance 1/2 * 1/4 + 1/4 * 1/2 + 1/4 * 1/4 = 5/16."""
    people = [("x y", "x", "a"), ("x", "x y", "b"), ("x", "z", "tie"), ("x y", "z", "b")]
    rows = [dict(prompt=f"q{i}", a=a, b=b, verdict=v) for i, (a, b, v) in enumerate(people)]
    rows += rows  # two people who agree: of each pair both labels count
    labels = write(tmp_path / "labels.jsonl", rows)
    args = settings(world, models, tmp_path / "out", labels=labels, models=[])
    eval_judge.main(eval_judge.Args(**args))
    printed = capsys.readouterr().out
    header, _, figures = [line.split(" | ") for line in printed.strip().splitlines()[-3:]]
    figures = dict(
        zip([x.strip("| ") for x in header], [x.strip("| ") for x in figures], strict=True)
    )
    assert (figures["labelled"], figures["agreement, %"]) == ("8", "75.0")
    assert float(figures["kappa"]) == pytest.approx((3 / 4 - 5 / 16) / (1 - 5 / 16), abs=1e-3)
    assert len(journal(tmp_path / "out")) == 8


def test_a_judge_is_compared_with_another_ones_journal(world, models, generated, tmp_path, capsys):
    first = tmp_path / "first.py"
    first.write_text("def judge(prompt, a, b):\n    return 'a'\n")
    evaluate(world, models, tmp_path / "one", generated, judge=str(first), num_prompts=20)
    other = tmp_path / "one/verdicts.0.jsonl"
    report = evaluate(world, models, tmp_path / "two", generated, num_prompts=20, labels=str(other))
    cell = report["matrix"]["one"]["two"]["verdicts"]
    ties = sum(both in (["tie", "tie"], ["a", "a"], ["b", "b"]) for both in cell)
    assert report["judge"]["labelled"] == 20 == len(cell)
    assert report["judge"]["agreement_percent"] == 100 * ties / 20
    assert f"| {100 * ties / 20:.4g} |" in capsys.readouterr().out
    # The same where both judges' verdicts are in one folder, and split as by two processes.
    options = dict(num_prompts=20, labels=str(other))
    lines = [*journal(tmp_path / "one"), *journal(tmp_path / "two")]
    write(other, lines[::2])
    write(tmp_path / "one/verdicts.1.jsonl", lines[1::2])
    again = evaluate(world, models, tmp_path / "two", **options)
    assert again["judge"]["agreement_percent"] == 100 * ties / 20
    third = [line | {"key": f"third {line['key']}"} for line in lines]
    for found, error in (
        (lines + third, "verdicts of several other judges"),
        (journal(tmp_path / "two"), "no verdict of another"),  # its own alone
    ):
        labels = write(tmp_path / "labels.jsonl", found)
        with pytest.raises(SystemExit):
            evaluate(world, models, tmp_path / "two", **options | dict(labels=labels))
        assert error in capsys.readouterr().err
    shutil.copy(other, tmp_path / "old.jsonl")
    lines = [{k: v for k, v in line.items() if k != "texts"} for line in journal(tmp_path / "one")]
    write(tmp_path / "old.jsonl", lines)
    with pytest.raises(SystemExit):
        evaluate(world, models, tmp_path / "two", labels=f"{tmp_path}/old.jsonl")
    assert "row 1: it needs prompt, a, b and verdict" in capsys.readouterr().err


def test_a_file_of_answers_is_not_written_over(world, models, generated, tmp_path):
    """Though it lies where this run's own answers go, and has more than these."""
    shutil.copytree(generated, tmp_path / "out")
    path = tmp_path / "out/model_outputs/one.json"
    before = path.read_text()
    names = [f"one={path}", f"two={models}/m1"]
    evaluate(world, models, tmp_path / "out", models=names, num_prompts=5)
    assert path.read_text() == before and len(json.loads(before)) == 30
    assert len(json.loads((path.parent / "two.json").read_text())) == 5


@pytest.mark.parametrize("what", ["template", "tokenizer"])
def test_a_judges_template_and_tokenizer_are_part_of_it(what, models, tmp_path):
    judge = shutil.copytree(models / "m0", tmp_path / "judge")
    args = eval_judge.Args(judge=str(judge), models=["one=1", "two=2"])
    before = eval_judge.LocalJudge(args).id
    assert eval_judge.LocalJudge(args).id == before
    tokenizer = AutoTokenizer.from_pretrained(judge)
    if what == "template":
        tokenizer.chat_template += " "
    else:
        tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(judge)
    assert eval_judge.LocalJudge(args).id != before


def test_another_wording_is_another_judge(world, models, generated, tmp_path, serve, capsys):
    server = serve(lambda message, body, headers: completion(by_rule(message)))
    args = endpoint(server, num_prompts=5)
    evaluate(world, models, tmp_path / "out", generated, **args)
    wording = tmp_path / "wording.txt"
    wording.write_text("Which is ruder?\n" + eval_judge.JUDGE_PROMPT)
    evaluate(world, models, tmp_path / "out", judge_prompt=str(wording), **args)
    first, second = server.seen[:10], server.seen[10:]
    assert len(second) == 10 and all(m.startswith("Which is ruder?\nTwo") for m, *_ in second)
    assert {"Which is ruder?\n" + m for m, *_ in first} == {m for m, *_ in second}
    evaluate(world, models, tmp_path / "out", judge_prompt=str(wording), **args)
    assert len(server.seen) == 20
    for text in ("{a} or {b}?", "{fence}{conversation}{a}{b}{c}", "{fence}{conversation}{a}{b}{"):
        wording.write_text(text)
        with pytest.raises(SystemExit) as end:
            evaluate(world, models, tmp_path / "out", judge_prompt=str(wording), **args)
        assert end.value.code == 2 and "needs {fence}, {conversation}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate(world, models, tmp_path / "out", judge_prompt=str(wording))
    assert "for judges that are models" in capsys.readouterr().err
