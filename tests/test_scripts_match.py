"""The method scripts are one text but for their method: whoever changes the loop in one changes it
in all. What a method may change is found in the syntax tree: the scripts carry no marks for it.

The loop is held together in every file of the root and of baselines/ that has a `preference_loss`,
also in a user's own; the rest holds for the files of this repository alone."""

import ast
import dataclasses
import difflib
import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASELINES = "cpo rdpo orpo slic rrhf sppo simper fdpo".split()
BASELINES = [f"baselines.{name}" for name in BASELINES]  # by module, as they are run and imported
METHODS = ["dpo", "ipo", "kto", "spo", "stapo", "alphapo", *BASELINES]
SCRIPTS = ["sft", *METHODS]
ENGINE = {"settings", "data", "dataset_files", "model_files", "files", "terminal"}
SHARED = {"common", *ENGINE, "chat", "curves", "eval_endpoint", "eval_files", "eval_report"}
SHIPPED = {*SCRIPTS, *SHARED, "eval_judge", "sample_pairs"}
# What each may import of the project; curves.py is imported by common.py when a run ends.
IMPORTS = dict.fromkeys(["terminal", "chat", "dataset_files", "files", "curves"], set())
IMPORTS |= {"settings": {"terminal"}, "model_files": {"chat", "dataset_files"}}
IMPORTS |= {"data": {"chat", "dataset_files", "terminal"}, "common": {*ENGINE, "chat"}}
IMPORTS |= {"kto": {"common", "data"}, "eval_report": {"common", "files", "eval_endpoint"}}
IMPORTS |= {"eval_endpoint": {"common"}, "eval_files": {"common", "chat", "dataset_files"}}
IMPORTS["eval_judge"] = {"common", "chat", "dataset_files", "model_files"}
IMPORTS["eval_judge"] |= {"eval_endpoint", "eval_files", "eval_report"}
IMPORTS["sample_pairs"] = {"common", "chat", "data", "eval_files", "eval_judge"}
IMPORTS["sample_pairs"] |= {"dataset_files", "files", "model_files"}
FOLDERS = ("bench/**/*.py", "docs/*.py", "tests/**/*.py", "toy/**/*.py")
FILES = [path for folder in FOLDERS for path in sorted(ROOT.glob(folder))]
FILES += [ROOT / f"{name.replace('.', '/')}.py" for name in sorted(SHIPPED)]


def texts(root):
    """{module: text} of the files in `root` and in its baselines/."""
    paths = sorted(root.glob("*.py")) + sorted(root.glob("baselines/*.py"))
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path.read_text() for path in paths
    }


def with_preference_loss(texts):
    """The modules that define it at their top level."""
    found = {name: ast.parse(text).body for name, text in texts.items()}
    return [
        name
        for name, body in found.items()
        if any(getattr(node, "name", "") == "preference_loss" for node in body)
    ]


TEXTS = texts(ROOT)
PAIRED = with_preference_loss(TEXTS)  # also a user's own

SHARED_FIELDS = (
    "model dataset train_split eval_split max_rows apply_chat_template chat_template output_dir"
    " num_train_epochs max_steps batch_size tokens_per_micro_batch max_length warmup_ratio"
    " lr_scheduler max_grad_norm gradient_checkpointing eval_every save_every keep_checkpoints"
    " export_every resume overwrite report_to seed"
).split()

FREE = {"uses_reference", "preference_loss"}
# script: more top-level functions that are free in it, each with its reason. Only kto.py needs any,
# as its rows are not pairs. They hold the loop itself, so a test of its own counts its changes.
ALSO_FREE = {
    "kto": {
        "kto_loss": "a row has one completion and a label, and the loss needs z0",
        "partners": "z0 is a mean over prompts with the completions of other rows",
        "mismatch": "these pairs have to be made",
        "report_classes": "nothing else shows that one class is missing or outweighs the other",
        "estimate_kl": "z0 is estimated anew in each step",
        "add_rows": "metrics are means over a class, not over pairs",
        "with_margins": "and so is the margin between them",
        "evaluate": "it needs z0, too",
        "main": "so does the loop",
    }
}
STRICT = [name for name in METHODS[1:] if name not in ALSO_FREE]

LOSS = {"sft": "sft_loss", "kto": "kto_loss"}
# Lines of the file, all of them: a file is read in one sitting, or not at all.
MOST_LINES = {"common": 1000, "data": 450, "kto": 285, "curves": 220}
MOST_LINES |= {"eval_judge": 660, "eval_report": 450, "sample_pairs": 360}


def top_level(tree, kind, name):
    return next(node for node in tree.body if isinstance(node, kind) and node.name == name)


def own_fields(args_class):
    """The fields before `model`."""
    fields = [node for node in args_class.body if isinstance(node, ast.AnnAssign)]
    return list(itertools.takewhile(lambda field: field.target.id != "model", fields))


def free_regions(source, also_free=()):
    """(first line, last line) of all that a method may change."""
    tree = ast.parse(source)
    docstring, *rest = tree.body
    imports = list(
        itertools.takewhile(lambda node: isinstance(node, ast.Import | ast.ImportFrom), rest)
    )
    args_class = top_level(tree, ast.ClassDef, "Args")
    own = own_fields(args_class)
    checks = [node for node in args_class.body if getattr(node, "name", "") == "__post_init__"]
    functions = [node for node in tree.body if getattr(node, "name", "") in FREE | set(also_free)]
    starts = [min(part.lineno for part in (node, *node.decorator_list)) for node in functions]
    return [
        (docstring.lineno, docstring.end_lineno),
        (imports[0].lineno, imports[-1].end_lineno),
        (args_class.lineno + 1, own[-1].end_lineno),
        *((node.lineno - 1, node.end_lineno) for node in checks),  # and the blank line before
        *((start, node.end_lineno) for start, node in zip(starts, functions, strict=True)),
    ]


def without(source, regions):
    """The lines of `source` that lie in none of the regions."""
    dropped = {line for first, last in regions for line in range(first, last + 1)}
    return [text for line, text in enumerate(source.splitlines(), 1) if line not in dropped]


def drift(name, text):
    """The unified diff of what a script must have in common with dpo.py; empty where it has it."""
    also_free = ALSO_FREE.get(name, ())
    shared = [without(source, free_regions(source, also_free)) for source in (TEXTS["dpo"], text)]
    if also_free:  # around functions that dpo.py lacks there are blank lines that it lacks
        shared = [[line for line in lines if line] for lines in shared]
    return "\n".join(
        difflib.unified_diff(*shared, "dpo.py", f"{name.replace('.', '/')}.py", lineterm="")
    )


def changes(source, other):
    """(start, end, other start, other end) of each difference: half-open, lines counted from 0."""
    matcher = difflib.SequenceMatcher(None, source.splitlines(), other.splitlines(), autojunk=False)
    return [place for kind, *place in matcher.get_opcodes() if kind != "equal"]


def training_loop(source):
    """The `for step in ...` of main."""
    main = top_level(ast.parse(source), ast.FunctionDef, "main")
    loops = [node for node in ast.walk(main) if isinstance(node, ast.For)]
    return next(node for node in loops if ast.unparse(node.target) == "step")


@pytest.mark.parametrize("name", sorted({*METHODS, *PAIRED} - {"dpo"}))
def test_all_but_the_method_is_the_same_text(name):
    report = drift(name, TEXTS[name])
    assert not report, f"copy the change to every method script\n{report}"


def test_every_method_of_pairs_is_found(tmp_path):
    assert {*STRICT, "dpo"} <= set(PAIRED)
    (tmp_path / "baselines").mkdir()
    for name, text in {
        "mine": TEXTS["dpo"],
        "baselines/theirs": TEXTS["dpo"].replace("so we multiply", "hence the product"),
        "helper": "import dpo\n\nloss = dpo.preference_loss\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    found = texts(tmp_path)
    assert with_preference_loss(found) == ["mine", "baselines.theirs"]
    assert not drift("mine", found["mine"])
    assert drift("theirs", found["baselines.theirs"]).startswith("--- dpo.py\n+++ theirs.py")


@pytest.mark.parametrize("name", STRICT)
def test_a_method_is_at_most_30_changed_lines(name):
    docstrings_apart = []
    for text in (TEXTS["dpo"], TEXTS[name]):
        docstring, *_ = free_regions(text)
        docstrings_apart.append("\n".join(without(text, [docstring])))
    places = changes(*docstrings_apart)
    changed = sum(
        end - start + other_end - other_start for start, end, other_start, other_end in places
    )
    assert changed <= 30


@pytest.mark.parametrize("function, most", [("main", 20), ("evaluate", 10)])
def test_ktos_loop_is_dpos_but_for_rows_and_z0(function, most):
    sources = TEXTS["dpo"], TEXTS["kto"]
    nodes = [top_level(ast.parse(source), ast.FunctionDef, function) for source in sources]
    places = changes(*map(ast.get_source_segment, sources, nodes))
    assert (
        sum(end - start + other_end - other_start for start, end, other_start, other_end in places)
        <= most
    )


@pytest.mark.parametrize("name", STRICT)
def test_all_changes_end_before_the_loop_begins(name):
    *_, (_, end, _, other_end) = changes(TEXTS["dpo"], TEXTS[name])
    assert end < training_loop(TEXTS["dpo"]).lineno
    assert other_end < training_loop(TEXTS[name]).lineno


DRIFTS = {
    "loop": (" / args.batch_size", ""),
    "comment": ("so we multiply", "hence the product"),
    "blank line": ("        optimizer.step()\n", "        optimizer.step()\n\n"),
    "evaluation": ('metrics.reduce("eval/")', 'metrics.reduce("test/")'),
    "shared default": ("default=2048", "default=4096"),
    "shared help": ('"passes over the training rows"', '"epochs"'),
    "new field": ("    dataset: str", "    floor: float = 0.0\n    dataset: str"),
    "new function": (
        "@torch.no_grad()\ndef evaluate",
        "def helper():\n    pass\n\n\n@torch.no_grad()\ndef evaluate",
    ),
}
FREEDOMS = {
    "docstring": (
        "\n\nDepartures from the paper:",
        "\n\nAnother paragraph.\n\nDepartures from the paper:",
    ),
    "import": ("import torch\n", "import math\n\nimport torch\n"),
    "own default": ("default=5e-7", "default=1e-6"),
    "own field": ("    learning_rate: float", "    floor: float = 0.0\n    learning_rate: float"),
    "check": ("if self.beta <= 0:", "if self.beta < 0:"),
    "uses_reference": ("    return True\n", "    return args.beta > 1\n"),
    "loss": ("    return losses, ", "    losses = losses.relu()  # a test\n\n    return losses, "),
}


def edited(old, new):
    assert TEXTS["dpo"].count(old) == 1
    return TEXTS["dpo"].replace(old, new)


@pytest.mark.parametrize("old, new", DRIFTS.values(), ids=DRIFTS)
def test_drift_is_reported(old, new):
    assert drift("copy", edited(old, new))


@pytest.mark.parametrize("old, new", FREEDOMS.values(), ids=FREEDOMS)
def test_a_method_is_free_in_its_own_regions(old, new):
    assert not drift("copy", edited(old, new))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_algorithm_stands_in_the_loop(name):
    calls = [
        node.func for node in ast.walk(training_loop(TEXTS[name])) if isinstance(node, ast.Call)
    ]
    called = {call.attr if isinstance(call, ast.Attribute) else call.id for call in calls}
    needed = {LOSS.get(name, "preference_loss"), "backward", "clip_grad_norm_", "step", "zero_grad"}
    assert needed <= called


@pytest.mark.parametrize("name", SCRIPTS)
def test_shared_settings_have_the_same_names(name):
    names = [field.name for field in dataclasses.fields(importlib.import_module(name).Args)]
    assert names[names.index("model") :] == SHARED_FIELDS


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_scripts_import_common_and_nothing_else_of_the_project(name):
    imported = set()
    for node in ast.walk(ast.parse(TEXTS[name])):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {alias.name for alias in node.names} | {getattr(node, "module", None)}
    assert imported & TEXTS.keys() == IMPORTS.get(name, {"common"})


@pytest.mark.parametrize("name", sorted(SHARED))
def test_what_is_shared_names_no_method(name):
    methods = "|".join(name.removeprefix("baselines.") for name in METHODS)
    assert not re.findall(rf"\b({methods})\b", TEXTS[name], re.IGNORECASE)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_files_can_be_read_in_one_sitting(name):
    assert len(TEXTS[name].splitlines()) <= MOST_LINES.get(name, 220)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_and_lines_are_short(path):
    source = path.read_text()
    most = 40 if path.stem in SHARED else 70
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > most} == {}
    assert [line for line, text in enumerate(source.splitlines(), 1) if len(text) > 100] == []


def test_importing_the_scripts_does_nothing(tmp_path):
    code = (
        f"import torch, {', '.join(sorted(SHIPPED))}; assert not torch.distributed.is_initialized()"
    )
    how = dict(
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, **how)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    assert not list(tmp_path.iterdir())
