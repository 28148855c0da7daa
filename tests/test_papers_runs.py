"""papers/run.py and its figures: which runs a plan is, that nothing runs twice, what is drawn from
made-up runs whose numbers are known, and a few real ones."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "papers"))
import figures  # noqa: E402
import plans  # noqa: E402
import quick  # noqa: E402
import run as runner  # noqa: E402

SHORT = "max_steps=48", "eval_every=48"
SPO = dict(script="spo", beta=[0.2, 0.4], alpha=0)


@pytest.fixture
def runs_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def write_scores(run, **scores):
    for step in run.models:
        run.score_file(step).parent.mkdir(parents=True, exist_ok=True)
        start = dict(
            good=0.4, gain=0.0, gain_se=0.0, distinct=1.0, entropy=1.2, kl=0.0, length=10.0
        )
        start["grades"] = [1, 0, 0, 0, 3]
        run.score_file(step).write_text(
            json.dumps(dict(start=start | dict(model="a"), model=scores | dict(model="b")))
        )


def write_config(run, **others):
    """The two files by which a finished run is known."""
    (run.folder / "config.json").touch()
    (run.folder / "config.yaml").write_text(yaml.safe_dump(run.settings | others))


# ---- Plans ----
def test_the_lists_of_an_entry_are_crossed():
    runs = plans.runs_of(SPO)
    names = [run.folder.relative_to(plans.RUNS).as_posix() for run in runs]
    assert names[:3] == [f"spo/alpha=0,seed={seed}" for seed in (0, 1, 2)]  # 0.2 is the recipe's
    assert names[3:] == [f"spo/alpha=0,beta=0.4,seed={seed}" for seed in (0, 1, 2)]
    assert [run.steps for run in runs] == [256] * 6 and runs[0].models == {256: runs[0].folder}
    kept = plans.make_run("spo", dict(export_every=100)).models
    assert {step: path.name for step, path in kept.items()} == {
        100: "step-000100", 200: "step-000200", 256: "export_every=100"
    }  # fmt: skip
    assert runs[3].settings["learning_rate"] == 6e-4 and runs[3].settings["model"] == "toy/sft"


def test_the_same_settings_are_the_same_run():
    assert plans.make_run("spo", dict(beta=0.2, seed=1)) == plans.make_run("spo", dict(seed=1))
    assert plans.make_run("spo", dict(beta=0.3)) != plans.make_run("spo", {})
    alpha, gamma = (set(plans.plan(name)) for name in ("alpha", "gamma"))
    assert len(alpha & gamma) == 3  # alpha 0.25 and gamma 0.2, which are the recipe's


def test_a_sweep_is_read_from_the_command_line(capsys):
    runs = plans.sweep("alphapo alpha=-2,0.25 seeds=0,1".split())
    assert [(run.settings["alpha"], run.settings["seed"]) for run in runs] == [
        (-2, 0), (-2, 1), (0.25, 0), (0.25, 1)
    ]  # fmt: skip
    (run,) = plans.sweep("stapo contrast=simpo learning_rate=5e-5 seeds=0".split())
    assert run.settings["learning_rate"] == 5e-5 and run.settings["contrast"] == "simpo"
    for words, error in (
        ("alfapo alpha=1", "recipes/toy.yaml has no script alfapo"),
        ("orpo alfa=1", "orpo has no setting alfa"),
        ("alphapo alpha", "sweep alphapo alpha: settings are name=value,value"),
        ("alphapo alpha=", "sweep alphapo alpha=: settings are name=value,value"),
        ("alphapo seed=7", "sweep alphapo seed=7: it is seeds=7"),
    ):
        with pytest.raises(SystemExit) as end:
            plans.sweep(words.split())
        assert end.value.code == 2 and error in capsys.readouterr().err


def test_the_best_of_a_grid_is_trained_in_full(runs_folder):
    grid = plans.grid("DPO")
    assert len(grid) == 4 and {run.steps for run in grid} == {128}
    assert {run.settings["seed"] for run in grid} == {100}
    for place, run in enumerate(grid):
        write_scores(run, good=[0.5, 0.6, 0.7, 0.65][place])
    runs = plans.chosen("DPO")
    best = dict(grid[2].changes)
    assert [run.settings["seed"] for run in runs] == [0, 1, 2]
    assert all(run.settings["beta"] == best.get("beta", 1.0) for run in runs)
    assert all(run.settings["learning_rate"] == grid[2].settings["learning_rate"] for run in runs)
    assert all(run.steps == 256 for run in runs)


def test_each_method_has_the_same_number_of_settings_to_choose_from():
    assert {len(plans.grid(method)) for method in plans.PLANS["methods"]} == {4}


def test_what_is_there_is_not_run_again(runs_folder, monkeypatch, capsys):
    runs = plans.runs_of(SPO)
    trained, batches = [], []
    monkeypatch.setattr(runner, "train", trained.append)
    monkeypatch.setattr(runner, "score", batches.append)
    for run in runs[:2]:  # the first is scored, too
        run.folder.mkdir(parents=True)
        write_config(run)
    write_scores(runs[0], good=0.5)
    runner.finish(runs + runs, at_once=1)
    assert trained == runs[2:] and sorted(sum(batches, []), key=runs.index) == runs[1:]
    assert capsys.readouterr().out.startswith("6 runs: 4 to train, 5 models to score, about ")
    batches.clear()  # models of one seed are shared among the processes
    runner.finish([*plans.runs_of(SPO | dict(beta=[1, 2, 3], seeds=0))], at_once=2)
    assert [len(batch) for batch in batches] == [2, 1]
    write_config(runs[0], learning_rate=1e-3)  # as after a change of recipes/toy.yaml
    with pytest.raises(SystemExit):
        runner.finish(runs, at_once=1)
    assert f"{runs[0].folder} was trained with learning_rate 0.001" in capsys.readouterr().err


# ---- What is drawn ----
def test_margins_by_hand(runs_folder):
    """Two pairs: log-ratios 2 and -1 against 1 and 1, means -1 and -2 against -3 and -1."""
    values = dict(
        policy=np.array([[-4.0, -9.0], [-8.0, -2.0]], dtype=np.float32),
        reference=np.array([[-6.0, -8.0], [-9.0, -3.0]], dtype=np.float32),
        lengths=np.array([[4, 3], [4, 2]]),
    )
    for script, knobs, expected in (
        ("dpo", {}, [2 + 1, 1 - 1]),
        ("stapo", {}, [2 + 1, 1 - 1]),  # the recipe's contrast is dpo
        ("stapo", dict(contrast="simpo"), [-1 + 3, -2 + 1]),
        ("alphapo", {}, [-1 + 3, -2 + 1]),
    ):
        run = plans.make_run(script, knobs)
        (run.folder / "eval").mkdir(parents=True)
        save_file(values, run.folder / "eval/step-000128.safetensors")
        assert figures.margins(run, 128).tolist() == expected


def write_run(run, chosen, rejected, good):
    """A folder as a finished run leaves it: two held-out pairs, which move in a line to log-ratios
    `chosen` and `rejected`, from log-probs of -8 and -9 nats over 4 tokens."""
    (run.folder / "eval").mkdir(parents=True, exist_ok=True)
    write_config(run)
    lines, start = [], np.array([[-8.0, -9.0]] * 2, dtype=np.float32)
    for step in range(0, run.steps + 1, run.settings["eval_every"]):
        moved = np.array([chosen, rejected]) * step / run.steps
        values = dict(policy=(start + moved).astype(np.float32), reference=start)
        values |= dict(lengths=np.full((2, 2), 4), entropy=np.ones((2, 2), dtype=np.float32))
        save_file(values, run.folder / f"eval/step-{step:06d}.safetensors")
        line = {"step": step, "eval/loss": 1.0}
        for place, side in enumerate(("chosen", "rejected")):
            line[f"eval/logratios/{side}"] = moved[place]
            line[f"eval/logps/{side}_mean"] = (start[0, place] + moved[place]) / 4
        lines.append(json.dumps(line))
    (run.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    scores = dict(good=good, gain=good - 0.4, gain_se=0.02, distinct=0.99, entropy=1.1, kl=2.0)
    write_scores(run, **scores, length=9.0, grades=[0, 1, 2, 3, 4])


GOOD, BAD = "plum and kiwi.", "plum and plum."


def write_answers(folder, **models):
    """The answers of models, as eval_judge.py writes them for AlpacaEval."""
    (folder / "model_outputs").mkdir(exist_ok=True)
    for name, texts in models.items():
        lines = [dict(instruction="Name 2 fruits.", output=text, generator=name) for text in texts]
        (folder / f"model_outputs/{name}.json").write_text(json.dumps(lines))


@pytest.fixture
def made_up(runs_folder, tmp_path, monkeypatch):
    """Runs of all plans, and the folder that the page is written to."""
    monkeypatch.setattr(figures, "HERE", tmp_path)
    shutil.copy(ROOT / "papers/on_policy.json", tmp_path)
    for name in plans.PLANS["plans"]:
        for run in plans.plan(name):
            write_run(run, 0.5, -3.0, 0.6 + 0.01 * run.settings["seed"])
    for method in plans.PLANS["methods"]:
        for run in plans.grid(method):
            write_scores(run, good=0.5)
        for run in plans.chosen(method):
            write_run(run, 0.5, -3.0, 0.7 + 0.01 * run.settings["seed"])
    names = ["SFT", *(re.sub("[^A-Za-z0-9]+", "-", name) for name in plans.PLANS["methods"])]
    for seed in range(3):
        rates = {a: {b: dict(win_rate=60.0 + seed) for b in names if b != a} for a in names}
        (runs_folder / f"judge/seed-{seed}").mkdir(parents=True)
        report = runs_folder / f"judge/seed-{seed}/report.json"
        report.write_text(json.dumps(dict(matrix=rates)))
        # of four requests AlphaPO alone wins two, both win one, and SimPO loses one alone
        write_answers(report.parent, SFT=[BAD, BAD, BAD, GOOD], AlphaPO=[GOOD] * 4)
        write_answers(report.parent, SimPO=[BAD, BAD, GOOD, BAD])
    return tmp_path


def test_the_page_has_the_numbers_of_the_runs(made_up):
    figures.draw([*plans.PLANS["plans"], "methods"], complete=True)
    page = (made_up / "results.md").read_text()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in page.splitlines() if row]
    (sppo,) = (row for row in rows if row[:1] == ["SPPO"] and len(row) == 9)
    assert sppo[2:] == [
        "71.0 (70.0 to 72.0)", "+31.0 ± 2.0", "99", "1.10 (1.10 to 1.10)", "2.00 (2.00 to 2.00)",
        "9.00 (9.00 to 9.00)", "+0.5, -3.0",
    ]  # fmt: skip
    # beta 0.2, alpha 0.4: the chosen log-ratio is to end at 1/0.2 - 1/0.4, the rejected at -1/0.4
    (target,) = (row for row in rows if row[:2] == ["5", "alpha 0.4"])
    assert target[2:] == ["+2.5", "-2.5", *(f"{x} ({x} to {x})" for x in (0.5, -3.0, 3.5))]
    (one_term,) = (row for row in rows if row[:2] == ["5", "one term"])
    assert one_term[2:4] == ["", ""]
    # Z after training: means (-8 + 0.5) / 4 and (-9 - 3) / 4 apart, between the margins 1 and 1.5
    margins = {row[0]: row for row in rows if len(row) == 10}
    good = "61.0 (60.0 to 62.0)"
    paper = ["0.4, 0.6", "57.88", "59.62", "60.46"]
    assert margins["1, 1.5"] == ["1, 1.5", *[good] * 3, "1.12", "100", *paper]  # 4.5 / 4
    assert margins["1.5, 2"][5:7] == ["0", "0.6, 0.8"]
    assert any(row == ["SPO against DPO", "61.0 (60.0 to 62.0)", "56.5", "53.73"] for row in rows)
    pictures = re.findall(r"\]\((figures/\w+\.png)\)", page)
    assert len(pictures) == 14 and all(
        (made_up / file).stat().st_size > 10_000 for file in pictures
    )
    results = json.loads((made_up / "results.json").read_text())
    assert len(results) > 100 and all(result["start"]["good"] == 0.4 for result in results)
    assert all(result["log_ratios"] == [0.5, -3.0] for result in results)


def test_verdicts_of_two_models_are_crossed(made_up, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, name, alt: drawn.append(figure))
    figures.by_request()
    numbers = [float(text.get_text()) for text in drawn[0].axes[0].texts]
    # rows: AlphaPO loses, ties, wins; columns: SimPO loses, ties, wins
    assert numbers == [0, 0, 0, 25, 0, 0, 0, 50, 25]


def test_a_sweep_over_words_is_drawn(runs_folder, capsys):
    runs = plans.sweep("stapo contrast=simpo,dpo beta=0.5,1 seeds=0".split())
    for run in runs:
        write_scores(run, good=0.6, length=9.0, kl=2.0)
    figures.draw_sweep(runs)
    assert "| 0.5 | simpo | 60.00 | 9.00 | 2.00 |" in capsys.readouterr().out
    assert (runs_folder / "sweep.png").stat().st_size > 10_000


def test_a_plan_alone_draws_what_it_has_the_runs_for(made_up, capsys):
    figures.draw(["beta"], complete=False)
    printed = capsys.readouterr().out
    assert printed.startswith("## StaPO, Appendix B") and printed.count("\n## ") == 0
    assert printed.endswith(f"drawn in {made_up / 'figures'}\n")
    assert not (made_up / "results.md").exists()


def test_a_figure_says_its_question_and_its_place():
    for needed, function in figures.SECTIONS.values():
        assert set(needed) <= {*plans.PLANS["plans"], "methods"}
        assert "?" in function.__doc__, function.__name__
        assert re.search(
            r"(SPO( papers)?|StaPO|AlphaPO),\s.*(Fig|Table|Section)", function.__doc__, re.S
        )


def test_the_page_of_the_repository_was_written_by_the_command():
    """Its table of methods is that of results.json."""
    page = (ROOT / "papers/results.md").read_text()
    for title, (_, function) in figures.SECTIONS.items():
        assert f"## {title}\n\n{' '.join(function.__doc__.split())}\n" in page
    assert all(
        (ROOT / "papers" / file).exists() for file in re.findall(r"\]\((figures/.+?)\)", page)
    )


# ---- Real runs ----
def papers_run(*words):
    command = [sys.executable, "papers/run.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_quick_runs_end_where_their_losses_say():
    """And a sweep of two of the same runs trains nothing, but scores and draws them."""
    code, printed = papers_run("--quick")
    assert code == 0, printed
    assert printed.startswith("8 runs: ") and printed.count("| yes |") == 5
    code, printed = papers_run(*"sweep spo alpha=0 beta=0.2,0.4 seeds=7".split(), *SHORT)
    assert code == 0 and printed.startswith("2 runs: 0 to train, 2 models to score, "), printed
    runs = quick.runs()
    for beta in (0.2, 0.4):
        good = figures.score(runs[f"SPO, beta {beta}"], "good")
        assert good > 50 and f"| {beta} | {good:.2f} | " in printed
    for run in runs.values():
        shutil.rmtree(run.folder)


def test_quick_fails_where_a_margin_is_not_what_its_loss_says(runs_folder, capsys):
    for run in quick.runs().values():
        write_run(run, 0.5, -3.0, 0.6)  # a margin of 3.5 for all: beyond SPO's target of 2.5
    assert not quick.report()
    assert capsys.readouterr().out.count("| NO |") == 5


def test_matplotlib_is_asked_for():
    code = "import sys; sys.modules['matplotlib'] = None; sys.path[0] = 'papers'; import run"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the figures need matplotlib: pip install matplotlib\n"


def test_what_to_run_has_to_be_said():
    code, printed = papers_run()
    assert code == 2 and "which plan? all, sweep, recipe, alpha, " in printed
    code, printed = papers_run("alfa")
    assert code == 2 and "no plan alfa: there are all, sweep, recipe, alpha, " in printed
