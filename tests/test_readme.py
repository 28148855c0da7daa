"""What the README says of commands, settings, defaults, metrics and files is what the code has."""

import dataclasses
import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_scripts_match import SHARED, SHIPPED

import common
import dpo

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(SHIPPED - SHARED)
METHODS = [name for name in SCRIPTS if name not in ("sft", "eval_judge", "sample_pairs")]
ELSEWHERE = README.split("## Use the model elsewhere")[1].split("\n## ")[0]  # others' settings
CHOOSING = (ROOT / "docs/choosing.md").read_text()
BOTH = README + CHOOSING
COMMANDS = [
    part.strip()
    for line in re.findall(r"^    (\S.*)$", BOTH, re.M) + re.findall(r"`(python [^`]+)`", BOTH)
    for part in line.split("&&")
]


def args_of(name):
    return importlib.import_module(name).Args


OURS = [command for command in COMMANDS if re.search(r"\.py|-m baselines\.", command)]


@pytest.mark.parametrize("command", OURS)
def test_commands_are_understood(command, monkeypatch):
    command = re.sub(r"-m baselines\.(\w+)", r"baselines/\1.py", command)  # as its file would be
    words = shlex.split(command.removeprefix("OMP_NUM_THREADS=1 "))
    assert words[0] in ("python", "torchrun", "diff")
    files = [word for word in words if word.endswith(".py")]
    assert all((ROOT / file).is_file() for file in files if file != "mine.py")
    script = files[0].removesuffix(".py").replace("/", ".")
    if words[0] == "diff" or script not in [*SCRIPTS, "mine"]:
        return
    left_out = ["--help"]  # would print and exit
    if "runs/toy/spo/config.yaml" in words:  # is written by a run
        left_out += ["--config", "runs/toy/spo/config.yaml"]
    arguments = [word for word in words[words.index(files[0]) + 1 :] if word not in left_out]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [files[0], *arguments])
    common.parse_args(args_of("spo" if script == "mine" else script))


def test_the_first_screen_has_the_commands():
    first = README.splitlines()[:24]
    assert any("spo.py --config recipes/toy.yaml && python toy/score.py" in line for line in first)
    assert any("python -m pytest" in line for line in first)
    assert any(line == "    torchrun --nproc_per_node 8 spo.py --beta 0.1" for line in first)


def test_the_loss_that_is_shown_is_the_code():
    (shown,) = re.findall(r"```python\n(.+?)```", README, re.S)
    code = inspect.getsource(dpo.preference_loss)
    docstring = re.search(r'    """.+?"""\n', code, re.S)[0]
    assert shown == code.replace(docstring, "")


def test_settings_that_are_named_exist():
    fields = {field.name for name in SCRIPTS for field in dataclasses.fields(args_of(name))}
    others = {"config", "help", "nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "dist"}
    others |= {"max_restarts", "nodes", "ntasks", "gpus", "exclusive", "requeue"}  # and Slurm's
    named = set(re.findall(r"--(\w+)", README.replace(ELSEWHERE, "") + CHOOSING))
    assert named <= fields | others, named - fields - others


def table_rows():
    """{script: cells} of the table of the scripts."""
    rows = re.findall(r"^\| \[([\w/]+)\.py\]\(\1\.py\) \|(.*)\|$", README, re.M)
    return {
        name.replace("/", "."): [cell.strip() for cell in cells.split(" | ")]
        for name, cells in rows
    }


def test_every_script_is_in_the_table():
    assert sorted(table_rows()) == SCRIPTS


@pytest.mark.parametrize("name", METHODS)
def test_the_table_has_the_defaults_of_the_code(name):
    *_, cell = table_rows()[name]
    said = dict(part.split(" ", 1) for part in cell.strip("` ").split(", "))
    fields = dataclasses.fields(args_of(name))
    own = fields[: [field.name for field in fields].index("model")]
    assert said == {field.name: str(field.default).lower() for field in own}


@pytest.mark.parametrize("name", METHODS)
def test_the_formula_links_to_its_section(name):
    anchor = re.search(r"\]\(docs/losses\.md#([\w-]+)\)", table_rows()[name][0]).group(1)
    headings = re.findall(r"^## (.+)$", (ROOT / "docs/losses.md").read_text(), re.M)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}
    assert name.removeprefix("baselines.") in [*anchor.split("-"), anchor.replace("-", "")]


def test_every_metric_is_explained():
    batch = SimpleNamespace(rows=[0], lengths=torch.ones(2), ref_logps=torch.ones(2))
    metrics = common.Metrics(SimpleNamespace(tokens_computed=0), run=None)
    metrics.add_pairs(batch, torch.ones(2), *torch.ones(3, 1), entropies=torch.ones(2))
    names = metrics.sums.keys() - {"entropy"}
    measured = {*names, "eval/entropy", "grad_norm", "learning_rate", "tokens_per_second"}
    table = README.split("| metric |")[1].split("\n\n")[0]
    first_cells = re.findall(r"^\| (`.*?) \|", table, re.M)
    explained = {name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)}
    assert measured <= explained and explained - measured <= {"kl"}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_files_that_are_named_exist(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert (ROOT / "tests" / name).is_file(), name
