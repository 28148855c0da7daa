"""On-policy pairs on the toy world, in two rounds: prints a Markdown table of the good answers.

    python papers/on_policy.py           three seeds, to papers/on_policy.json

A round trains 128 steps, half of those of recipes/toy.yaml, on a schedule of its own; the second
starts from the first one's model, which is also its reference. With own pairs, each round begins
with sample_pairs.py: five answers of the round's start model to each prompt at temperature 0.8, the
best against the worst by toy/judge.py. The shipped pairs are the same in both rounds.
"""

import argparse
import json
from pathlib import Path

import figures
from plans import ROOT
from run import call
from tqdm.auto import tqdm

METHODS = {
    "SPO": ["spo.py"],
    "SimPO": ["alphapo.py", "--alpha=0"],
    # Its targets are SPO's here, log-ratios of +2.5 and -2.5 nats.
    "SPPO": ["-m", "baselines.sppo", "--beta=0.2"],
}
OUT = ROOT / "papers/on_policy.json"
ROUND = ["--config", "recipes/toy.yaml", "--max_steps=128", "--eval_every=0", "--save_every=0"]


def pairs_of(start, seed, folder):
    """The folder of a model's own pairs, and what sample_pairs.py has counted."""
    if not (folder / "report.json").exists():  # it exists where an earlier bench was stopped
        options = [f"--model={start}", f"--output_dir={folder}", f"--seed={seed}"]
        options += ["--config", "recipes/toy.yaml", "--eval_split="]
        call(folder.name, "sample_pairs.py", *options)
    return folder, json.loads((folder / "report.json").read_text())["train_prefs"]["counts"]


def train(script, start, dataset, seed, folder):
    """A round's model."""
    if not (folder / "config.json").exists():
        options = [f"--model={start}", f"--dataset={dataset}", f"--seed={seed}", "--resume"]
        call(folder.name, *script, *ROUND, *options, f"--output_dir={folder}")
    return folder


def main(args):
    runs = [(name, pairs) for name in METHODS for pairs in ("shipped", "own")]
    results = {run: [] for run in runs}
    for seed in range(args.seeds):
        models, counts = ["toy/sft"], []
        for name, pairs in tqdm(runs, f"seed {seed}"):
            start = "toy/sft"
            for number in (1, 2):
                dataset, counted = "toy/data", None
                if pairs == "own":  # the first round's are the same for all methods
                    place = f"pairs-{'sft' if number == 1 else name}-{seed}"
                    dataset, counted = pairs_of(start, seed, args.folder / place)
                folder = args.folder / f"{name}-{pairs}-{number}-{seed}"
                start = train(METHODS[name], start, dataset, seed, folder)
                models.append(start)
                counts.append(counted)
        file = args.folder / f"scores-{seed}.json"
        call(f"on-policy-{seed}", "toy/score.py", *models, "--seed", seed, "--json", file)
        first, *others = json.loads(file.read_text())
        for model in others:
            model["model"] = Path(model["model"]).name
        for place, run in enumerate(runs):
            rounds = slice(2 * place, 2 * place + 2)
            results[run].append(dict(models=[first, *others[rounds]], pairs=counts[rounds]))
    named = {", ".join(run): seeds for run, seeds in results.items()}
    OUT.write_text(json.dumps(dict(commit=figures.commit(), results=named), indent=1) + "\n")
    print(figures.own_pairs())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/on-policy", help="of the runs")
    main(parser.parse_args())
