"""The runs of plans.yaml: what is trained for which figure, and where it stands."""

import dataclasses
import functools
import importlib
import itertools
import json
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from terminal import fail  # noqa: E402

RUNS = ROOT / "runs/papers"
PLANS = yaml.safe_load((ROOT / "papers/plans.yaml").read_text())
RECIPE = yaml.safe_load((ROOT / "recipes/toy.yaml").read_text())
EPOCH = 128  # steps: 2,048 pairs, 16 a step
EVALUATE = dict(eval_every=64)
SEEDS = [0, 1, 2]
GRID_SEED = 100  # the choice among settings has a seed of its own


@functools.cache
def usual(script):
    """A script's settings on the toy world: its defaults under those of the recipe."""
    if not isinstance(RECIPE.get(script), dict):
        fail(f"recipes/toy.yaml has no script {script}")
    args = dataclasses.fields(importlib.import_module(module(script)).Args)
    defaults = {field.name: field.default for field in args}
    shared = {key: value for key, value in RECIPE.items() if key in defaults}
    return defaults | shared | RECIPE[script] | EVALUATE


def module(script):
    """spo; baselines.orpo for orpo."""
    return script if (ROOT / f"{script}.py").exists() else f"baselines.{script}"


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run on the toy world."""

    script: str
    changes: tuple  # (name, value) of what differs from `usual`, by name

    @property
    def settings(self):
        return usual(self.script) | dict(self.changes)

    @property
    def folder(self):
        words = [f"{key}={value}" for key, value in self.changes]
        return RUNS / self.script / (",".join(words) or "usual")

    @property
    def steps(self):
        return self.settings["max_steps"] or EPOCH * self.settings["num_train_epochs"]

    @property
    def models(self):
        """{step: folder} of the models that are kept and scored; the last one is the run's."""
        every = self.settings["export_every"] or self.steps
        kept = {step: f"models/step-{step:06d}" for step in range(every, self.steps, every)}
        return {step: self.folder / name for step, name in (kept | {self.steps: "."}).items()}

    def score_file(self, step):
        return self.folder / f"eval/score-{step:06d}.json"

    def scores(self, step=None):
        """What toy/score.py said of the model after so many steps, or of the last one."""
        return json.loads(self.score_file(step or self.steps).read_text())["model"]


def make_run(script, settings):
    if unknown := settings.keys() - usual(script).keys():
        fail(f"{script} has no setting {', '.join(sorted(unknown))}")
    differ = {key: value for key, value in settings.items() if value != usual(script)[key]}
    return Run(script, tuple(sorted(differ.items())))


def runs_of(entry):
    """The runs of a plan's entry, its lists crossed."""
    entry = dict(seeds=SEEDS) | entry
    script, entry["seed"] = entry.pop("script"), entry.pop("seeds")
    values = [value if isinstance(value, list) else [value] for value in entry.values()]
    rows = itertools.product(*values)
    return [make_run(script, dict(zip(entry, row, strict=True))) for row in rows]


def plan(name):
    """The runs of a plan of plans.yaml."""
    return [run for entry in PLANS["plans"][name] for run in runs_of(entry)]


def grid(method):
    """The runs that a method's settings are chosen from."""
    once = dict(num_train_epochs=1, eval_every=EPOCH)
    return runs_of(once | PLANS["methods"][method] | dict(seeds=GRID_SEED))


def chosen(method):
    """The runs of a method's best settings, by the good answers of its grid's runs."""
    best = max(grid(method), key=lambda run: run.scores()["good"])
    entry = PLANS["methods"][method]
    return runs_of(entry | {key: best.settings[key] for key in entry if key in best.settings})


def sweep(words):
    """The runs of `sweep SCRIPT setting=value,value ...`."""
    entry = dict(script=words[0])
    for word in words[1:]:
        name, _, values = word.partition("=")
        if not all(values.split(",")):
            fail(f"sweep {words[0]} {word}: settings are name=value,value")
        if name == "seed":
            fail(f"sweep {words[0]} {word}: it is seeds={values}")
        # YAML takes 5e-5, without a point, for text.
        numbers = [re.sub(r"^(-?\d+)e", r"\1.0e", value) for value in values.split(",")]
        entry[name] = [yaml.safe_load(number) for number in numbers]
    return runs_of(entry)
