"""Trains the runs of the papers' figures and tables on the toy world, scores them, and draws them.

    python papers/run.py all               # every plan of plans.yaml; papers/results.md at the end
    python papers/run.py alpha targets     # two of its plans, and their pictures
    python papers/run.py sweep alphapo alpha=-2,-1,0,0.25,1,2 seeds=0,1,2    # one of your own
    python papers/run.py --quick           # eight short runs, held to what their losses imply

A run is a folder of runs/papers, named after what differs from recipes/toy.yaml: what stands there
is not trained again, and what was interrupted goes on. Its scores (toy/score.py) are in its eval/.
"""

import argparse
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import plans
import yaml
from plans import ROOT, fail
from tqdm.auto import tqdm

if not importlib.util.find_spec("matplotlib"):
    fail("the figures need matplotlib: pip install matplotlib")
import figures  # noqa: E402
import quick  # noqa: E402

REQUESTS = 128  # that are answered; for the choice among settings, others
ANYWHERE = {"output_dir", "tokens_per_micro_batch"}  # what may differ from machine to machine
START_UP, STEP, SCORE = 14, 0.12, 6  # seconds of one core, for the estimate that is printed first


def call(log, *words):
    """Runs a Python file of the project, on one thread: small matrices gain nothing by more. Its
    output goes to a file in runs/papers/logs; ends this program where it fails."""
    log = plans.RUNS / "logs" / f"{log}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    with open(log, "w") as file:
        options = dict(cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        if subprocess.run(command, **options).returncode:
            fail(f"python {' '.join(command[1:])} has failed: see {log}")


def trained(run):
    """Whether the run has ended. Ends this program where it had other settings, as a folder keeps
    its name when recipes/toy.yaml changes."""
    if not (run.folder / "config.json").exists():  # a part of the export, with which a run ends
        return False
    before = yaml.safe_load((run.folder / "config.yaml").read_text())
    for name in run.settings.keys() & before.keys() - ANYWHERE:
        if run.settings[name] != before[name]:
            fail(f"{run.folder} was trained with {name} {before[name]}: delete it")
    return True


def train(run):
    settings = plans.EVALUATE | dict(run.changes) | dict(output_dir=run.folder)
    options = [f"--{name}={value}" for name, value in settings.items()]
    command = ["-m", plans.module(run.script), "--config", "recipes/toy.yaml", *options, "--resume"]
    call(f"{run.script},{run.folder.name}", *command)


def score(runs):
    """Scores the models of runs of one seed."""
    models = {run.score_file(step): run.models[step] for run in runs for step in run.models}
    seed = runs[0].settings["seed"]
    out = runs[0].score_file(0)
    options = ["--requests", REQUESTS, "--skip", REQUESTS if seed == plans.GRID_SEED else 0]
    options += ["--seed", seed, "--json", out]
    log = f"score {runs[0].script},{runs[0].folder.name}"
    call(log, "toy/score.py", "toy/sft", *models.values(), *options)
    start, *scores = json.loads(out.read_text())
    for file, model in zip(models, scores, strict=True):
        file.write_text(json.dumps(dict(start=start, model=model)) + "\n")
    out.unlink()


def finish(runs, at_once, scored=True):
    """Trains, and scores if wanted, what is not there yet, `at_once` processes at a time."""
    runs = list(dict.fromkeys(runs))  # a run of two plans is one
    todo = [run for run in runs if not trained(run)]
    unscored = [run for run in runs if scored and not run.score_file(run.steps).exists()]
    models = sum(len(run.models) for run in unscored)
    seconds = sum(START_UP + STEP * run.steps for run in todo) + SCORE * models
    ahead = f", about {seconds / at_once / 60:.0f} minutes, {at_once} at a time" if seconds else ""
    print(f"{len(runs)} runs: {len(todo)} to train, {models} models to score{ahead}", flush=True)

    def seed(run):
        return run.settings["seed"]

    with ThreadPoolExecutor(at_once) as pool:
        with tqdm(total=sum(run.steps for run in todo), desc="train", unit="step") as bar:
            for run, _ in zip(todo, pool.map(train, todo), strict=True):
                bar.update(run.steps)
        batches = []  # a process scores so many runs, as its start takes longer than a model
        for _, same in itertools.groupby(sorted(unscored, key=seed), seed):
            same = list(same)
            size = min(6, math.ceil(len(same) / at_once))
            batches += [same[first : first + size] for first in range(0, len(same), size)]
        list(tqdm(pool.map(score, batches), "score", len(batches), unit="batch"))


def judge(models, seed):
    """Win rates of {name: run} and the start against one another, by toy/judge.py."""
    names = [f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}={run.folder}" for name, run in models.items()]
    options = ["--config", "recipes/toy.yaml", "--output_dir", plans.RUNS / f"judge/seed-{seed}"]
    options += ["--seed", seed, "--models", "SFT=toy/sft", *names]
    call(f"judge-{seed}", "eval_judge.py", *options)


def main(args):
    if args.quick:
        finish(quick.runs().values(), args.at_once, scored=False)
        raise SystemExit(0 if quick.report() else 1)
    first, *words = args.plans
    if first == "sweep":
        if not words:
            fail("which? python papers/run.py sweep SCRIPT setting=value,value seeds=0,1,2")
        runs = plans.sweep(words)
        finish(runs, args.at_once)
        return figures.draw_sweep(runs)
    known = [*plans.PLANS["plans"], "methods"]
    names = known if first == "all" else args.plans
    if unknown := set(names) - set(known):
        fail(f"no plan {', '.join(unknown)}: there are all, sweep, {', '.join(known)}")
    methods = plans.PLANS["methods"] if "methods" in names else []
    runs = [run for name in names if name != "methods" for run in plans.plan(name)]
    finish(runs + [run for method in methods for run in plans.grid(method)], args.at_once)
    if methods:
        best = {method: plans.chosen(method) for method in methods}
        finish(itertools.chain(*best.values()), args.at_once)
        for seed, of_seed in enumerate(zip(*best.values(), strict=True)):
            judge(dict(zip(best, of_seed, strict=True)), seed)
    figures.draw(names, complete=first == "all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("plans", nargs="*", metavar="PLAN", help="of plans.yaml; all; sweep ...")
    parser.add_argument("--quick", action="store_true", help="eight short runs, and their checks")
    parser.add_argument("--at_once", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    if not (args.plans or args.quick):
        parser.error(f"which plan? all, sweep, {', '.join(plans.PLANS['plans'])}, methods; --quick")
    main(args)
