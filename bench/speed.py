"""dpo.py against TRL's DPOTrainer, side by side: the same model, rows, batches, length and
precision; pairs a second, peak memory, losses; and what the machine could do.

    pip install trl==1.16.0 matplotlib
    python bench/speed.py             # writes bench/results/speed-<machine>.json and the page
    python bench/speed.py --models 21M --repeats 1 --steps 3 --out /tmp/speed.json
    python bench/speed.py --report    # the page, docs/performance.md, from the JSON alone

First a sweep finds TRL's best setting. Then all take turns, `--repeats` times, each run a process
of its own (bench/speed_run.py). Their losses must agree step by step, or the comparison is void
and the exit code 1. The models are drawn at random, which changes no time; the rows are random
words, in lengths like UltraFeedback's: lognormal, a prompt with a median of 109 tokens and a mean
of 178, a response of 298 and 378, as in bench/gpu.py; what is over --max_length is cut."""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import gpu
import matplotlib
import matplotlib.pyplot as plt
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import dpo
from terminal import fail

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()
RESULTS, PAGE = ROOT / "bench/results", ROOT / "docs/performance.md"
PROMPT, RESPONSE = (109, 0.99), (298, 0.69)  # median, deviation of the logarithm; means 178, 378
SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
SIZES += ["num_key_value_heads"]
MODELS = {  # kind and SIZES
    "21M": ("llama", 32000, 256, 704, 6, 4, 2),
    "56M": ("llama", 32000, 512, 1408, 8, 8, 4),
    "0.5B": ("qwen2", 151936, 896, 4864, 24, 14, 2),  # Qwen2.5's
    "1.5B": ("qwen2", 151936, 1536, 8960, 28, 12, 2),
}
TRL, OURS, LIMIT = "TRL", "dpo.py", "matrix products"
# Losses of a step may differ by rounding: a response's log-prob, times beta. In bfloat16 a sum
# over 300 tokens was seen to move by 0.27 nats with the order in which rows are packed.
AGREE = 2e-2 if GPU else 1e-4
# On a CPU both also run with a malloc that keeps what is freed, where glibc's would give it back to
# the system and have the next step wait for pages.
MALLOC = {"": {}}
if not GPU:
    MALLOC[", malloc keeps"] = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36)}


# ---- What is compared ----
def write_model(name, folder):
    """A model folder with random weights; returns its number of parameters."""
    kind, *sizes = MODELS[name]
    settings = dict(zip(SIZES, sizes, strict=True), max_position_embeddings=4096, pad_token_id=0)
    settings |= dict(bos_token_id=None, eos_token_id=2, tie_word_embeddings=kind == "qwen2")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **settings), dtype=torch.float32
    )
    model.save_pretrained(folder)
    gpu.make_tokenizer().save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def write_rows(folder, args):
    """rows.jsonl, and in_order.jsonl with the same rows in the order in which dpo.py takes them."""
    rng = random.Random(0)

    def text(median, deviation, limit):
        length = round(median * math.exp(deviation * rng.gauss(0, 1)))
        return "".join(f" {word}" for word in rng.choices(gpu.WORDS, k=max(1, min(length, limit))))

    rows = []
    for _ in range(args.steps * args.batch_size):
        row = dict(prompt=text(*PROMPT, args.max_length // 2))  # a longer one is no row to compare
        rows.append(
            row | {side: text(*RESPONSE, args.max_length) for side in ("chosen", "rejected")}
        )
    settings = dpo.Args(batch_size=args.batch_size)
    steps = [data.rows_of_step(range(len(rows)), step, settings) for step in range(args.steps)]
    in_order = [rows[i] for step in steps for i in step]
    for name, content in (("rows", rows), ("in_order", in_order)):
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(lines)


def run(kind, work, args, malloc="", trl=None, steps=None):
    """What bench/speed_run.py reports of a run, and the machine's load before it."""
    with tempfile.TemporaryDirectory(dir=work) as folder:  # with caches of its own
        job = dict(model=f"{work}/model", rows=f"{work}/rows.jsonl", folder=folder, trl=trl)
        job |= dict(rows_in_order=f"{work}/in_order.jsonl", steps=steps or args.steps, beta=0.1)
        names = "batch_size max_length learning_rate tokens_per_micro_batch".split()
        job |= {name: getattr(args, name) for name in names}
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": folder, "TQDM_DISABLE": "1"}
        environment |= {"OMP_NUM_THREADS": str(args.threads), **MALLOC[malloc]}
        command = [sys.executable, str(ROOT / "bench/speed_run.py"), kind, json.dumps(job)]
        load = os.getloadavg()[0]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"load": load}


def settings_of_trl(batch_size):
    """{name: setting} of the sweep: micro-batches of up to 8 pairs, on a GPU with and without
    gradient checkpointing."""
    return {
        f"micro-batch {size}{', checkpointing' * on}": dict(
            micro_batch=size, gradient_checkpointing=on
        )
        for size in (1, 2, 4, 8)
        for on in ((False, True) if GPU else (False,))
        if size <= batch_size
    }


def sweep(work, args, bar):
    """({name: its figures}, the name of TRL's fastest setting), from runs of three steps."""
    seen = {}
    for name, setting in settings_of_trl(args.batch_size).items():
        try:
            seen[name] = run("trl", work, args, trl=setting, steps=3)
        except SystemExit as failed:
            if "OutOfMemory" not in str(failed):
                raise
            seen[name] = dict(pairs_per_second=0.0)
        bar.update()
    return seen, max(seen, key=lambda name: seen[name]["pairs_per_second"])


def compare(name, args):
    """All of one model, for the JSON."""
    settings, runs = settings_of_trl(args.batch_size), {}
    total = len(settings) + args.repeats * (1 + 2 * len(MALLOC)) + 1
    with tempfile.TemporaryDirectory() as folder, tqdm(desc=name, total=total, unit="run") as bar:
        work = Path(folder)
        parameters = write_model(name, work / "model")
        write_rows(work, args)
        tried, best = sweep(work, args, bar)
        turns = {f"{TRL}{malloc}": ("trl", malloc) for malloc in MALLOC}
        turns |= {f"{OURS}{malloc}": ("ours", malloc) for malloc in MALLOC}
        for _ in range(args.repeats):
            for who, (kind, malloc) in (turns | {LIMIT: ("limit", "")}).items():
                done = run(kind, work, args, malloc=malloc, trl=settings[best])
                runs.setdefault(who, []).append(done)
                bar.update()
        shares = run("profile", work, args)["shares"]
        bar.update()
    losses = {who: [x["losses"] for x in runs[who]] for who in turns}
    wanted = losses[TRL][0]
    apart = max(
        abs(x - y)
        for lines in losses.values()
        for line in lines
        for x, y in zip(line, wanted, strict=True)
    )
    found = dict(parameters=parameters, sweep=tried, best=best, runs=runs, shares=shares)
    return found | dict(losses_apart=apart, may_be_apart=AGREE, void=not apart <= AGREE)


def machine(args):
    """What the numbers were taken on and with."""
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    card = torch.cuda.get_device_name() if GPU else None
    peak = next((flops for part, flops in gpu.PEAK_FLOPS.items() if part in (card or "")), None)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    return dict(
        gpu=card,
        peak_flops=peak,
        cpu=cpu[1] if cpu else platform.processor(),
        cores=os.cpu_count(),
        threads=args.threads,
        precision="bfloat16, weights in float32" if GPU else "float32",
        versions={
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")
        },
        commit=subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        date=datetime.date.today().isoformat(),
    )


# ---- The page ----
HEAD = """# Speed and memory beside TRL

Written by `python bench/speed.py --report` from [bench/results](../bench/results); no number is
typed by hand. `python bench/speed.py` measures: [dpo.py](../dpo.py) and TRL's `DPOTrainer` train
the same random model on the same rows, in the same order and batches, in turns and as processes of
their own. The rows are synthetic, with lengths like UltraFeedback's. TRL runs in the setting that a
sweep finds to be its fastest, its reference computed beforehand, too. The first step of a run is
not timed. Their losses agree step by step, or the comparison counts as void.

"Matrix products" is the limit: the needed FLOPs (a pair's prompt once, the LM head at scored tokens
alone, causal attention), each at the speed that a bare product of its shape reached in the same
minutes. "With reference pass" charges a pass of the reference to each pair, as in a training of one
epoch. Figures are medians over the repeats, with the lowest and the highest in brackets; ratios are
taken within a repeat, and to TRL with the same malloc: glibc's as it is, or told to keep what is
freed. Peak memory is the whole process's, libraries included; on a GPU it is that
of the tensors.

![Pairs per second of TRL, dpo.py and the limit, by model](speed.png)
"""
RATES = ("pairs_per_second", "pairs_per_second_with_reference", "peak_gb")


def figures(found):
    """{contestant: {column: (median, lowest, highest)}} of a model. Ratios are those within a
    repeat, as a machine has better and worse minutes, and to TRL with the same malloc."""
    table = {}
    for name, runs in found["runs"].items():
        trl = name.replace(OURS, TRL) if name.startswith(OURS) else TRL
        columns = {key: [each[key] for each in runs] for key in RATES if key in runs[0]}
        for key, other in (("times", trl), ("share", LIMIT)):
            speeds = ([x["pairs_per_second"] for x in y] for y in (runs, found["runs"][other]))
            columns[key] = [x / y for x, y in zip(*speeds, strict=True)]
        table[name] = {key: (statistics.median(x), min(x), max(x)) for key, x in columns.items()}
    return table


def cell(figure, digits=2, factor=1, unit=""):
    """A median, with the lowest and the highest where they differ in print; "" for None."""
    if figure is None:
        return ""
    middle, low, high = (f"{factor * x:.{digits}f}" for x in figure)
    return f"{middle}{unit}" + (f" ({low} to {high})" if low != high else "")


def section(report):
    """Markdown lines of one machine."""
    at, settings = report["machine"], report["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
    lines = ["", f"## {at['gpu'] or at['cpu']}", ""]
    lines += [
        f"{at['cores']} CPU cores, {at['threads']} threads; {at['precision']}; {versions}; commit"
        f" {at['commit'][:7]}, {at['date']}. {settings['batch_size']} pairs a step, rows cut to"
        f" {settings['max_length']} tokens, {settings['tokens_per_micro_batch']:,} tokens in a"
        f" micro-batch of dpo.py; {settings['steps'] - 1} steps are timed in each of"
        f" {settings['repeats']} repeats."
    ]
    for name, found in report["models"].items():
        lines += ["", f"### {name}: {found['parameters']:,} parameters", ""]
        if found["void"]:
            lines += [f"**Void: losses are up to {found['losses_apart']:.1e} apart.**", ""]
        lines += [*rows_of_table(found, at["peak_flops"]), "", notes(found)]
    return lines


def rows_of_table(found, peak_flops):
    """Markdown lines: a row for each contestant."""
    header = "|pairs/s|times TRL's|share of the limit|with reference pass|peak, GB".split("|")
    header += ["MFU on needed FLOPs"] if peak_flops else []
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    flops = sum(found["runs"][LIMIT][0]["flops_per_pair"].values())
    for who, row in figures(found).items():
        speed = row["pairs_per_second"]
        cells = [who, cell(speed), cell(row["times"]), cell(row["share"], 0, 100, " %")]
        cells += [cell(row["pairs_per_second_with_reference"]), cell(row.get("peak_gb"))]
        if peak_flops:
            cells.append(f"{100 * speed[0] * flops / peak_flops:.0f} %")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def notes(found):
    """What stands below a model's table."""
    flops = sum(found["runs"][LIMIT][0]["flops_per_pair"].values())
    loads = [each["load"] for runs in found["runs"].values() for each in runs]
    sweep = [f"{how} {x['pairs_per_second']:.2f}" for how, x in found["sweep"].items()]
    most = [f"{name} {100 * share:.0f} %" for name, share in list(found["shares"].items())[:8]]
    return (
        f"Losses agree to {found['losses_apart']:.1e}. TRL's sweep, pairs/s: {'; '.join(sweep)};"
        f" {found['best']} was taken. A pair needs {flops / 1e9:.1f} GFLOP."
        f" The load before a run was {min(loads):.1f} to {max(loads):.1f}.\n\n"
        f"Where dpo.py's time in PyTorch's operators goes, in a step: {', '.join(most)}."
    )


def page(reports):
    """docs/performance.md from the contents of bench/results/speed-*.json."""
    return "\n".join([HEAD.rstrip(), *(line for report in reports for line in section(report)), ""])


def draw(reports, path):
    """Bars of pairs a second, a panel for each machine and model."""
    panels = [(report, name) for report in reports for name in report["models"]]
    size = dict(figsize=(4.4 * len(panels), 2.2), squeeze=False, layout="constrained")
    figure, axes = plt.subplots(1, len(panels), **size)
    for axis, (report, name) in zip(axes[0], panels, strict=True):
        rows = figures(report["models"][name])
        names = [who for who in rows if who != LIMIT] + [LIMIT]
        middle, low, high = zip(*(rows[who]["pairs_per_second"] for who in names), strict=True)
        spread = [[m - x for m, x in zip(middle, low, strict=True)]]
        spread += [[x - m for m, x in zip(middle, high, strict=True)]]
        colours = {TRL: "#777777", OURS: "#0072B2", LIMIT: "#cccccc"}
        colours = [colours[who.partition(",")[0]] for who in names]
        axis.barh(names, middle, xerr=spread, color=colours, capsize=3)
        axis.invert_yaxis()
        axis.set(xlabel="pairs/s", title=f"{name}, {report['machine']['gpu'] or 'CPU'}")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_page():
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("speed-*.json"))]
    if not reports:
        fail(f"no speed-*.json in {RESULTS}: run python bench/speed.py first")
    PAGE.write_text(page(reports))
    draw(reports, PAGE.parent / "speed.png")
    print(f"written: {PAGE} and its figure")


def main(args):
    if args.report:
        write_page()
        return
    if not importlib.util.find_spec("trl"):
        fail("TRL, to compare with, is not installed: pip install trl==1.16.0")
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "report")}
    report = dict(machine=machine(args), settings=settings, models={})
    label = re.sub(r"\W+", "-", f"speed {report['machine']['gpu'] or 'cpu'}".lower())
    out = args.out or RESULTS / f"{label}.json"
    for name in args.models:
        found = report["models"][name] = compare(name, args)
        out.write_text(json.dumps(report, indent=1) + "\n")
        print(
            "\n".join([name, *rows_of_table(found, report["machine"]["peak_flops"]), notes(found)])
        )
    if not args.out:
        write_page()
    void = [name for name in args.models if report["models"][name]["void"]]
    if void:
        raise SystemExit(f"void, as losses differ by more than {AGREE}: {', '.join(void)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    names = ["0.5B", "1.5B"] if GPU else ["21M", "56M"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=names)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of a run; the first is not timed")
    parser.add_argument("--batch_size", type=int, default=64 if GPU else 8, help="pairs of a step")
    parser.add_argument("--max_length", type=int, default=2048 if GPU else 512)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    tokens = dpo.Args().tokens_per_micro_batch
    parser.add_argument("--tokens_per_micro_batch", type=int, default=tokens, help="of dpo.py")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--out", type=Path, help="JSON file, in place of bench/results and the page"
    )
    parser.add_argument("--report", action="store_true", help="write the page, measure nothing")
    main(parser.parse_args())
