"""How time and memory grow with length, vocabulary, token budget, processes and rows, one of them
at a time: small random models on a CPU, by dpo.py as it is.

    python bench/growth.py             # bench/results/growth.json, and docs/growth.md from it
    python bench/growth.py --only Rows # the others' numbers stay as they are
    python bench/growth.py --quick     # the two smallest of each, on the screen alone
    python bench/growth.py --report    # the page from the JSON alone

Each number is of a process of its own, which computes in one thread. Its memory is what it takes at
most (VmHWM), above what it had when all was imported. CPU seconds hardly depend on what else the
machine does, wall seconds do."""

import argparse
import contextlib
import datetime
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "bench/results/growth.json", ROOT / "docs/growth.md"
MODEL = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=2, vocab_size=4096)
MODEL |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16384)
NARROW = MODEL | dict(hidden_size=64, intermediate_size=176)  # so that the head weighs
WARM_UP, STEPS = 1, 2  # steps of a training: the first are in no number


# ---- What is measured ----
def cpu_seconds():
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def memory_mb(name):
    """VmRSS, what this process has in memory now, or VmHWM, the most so far."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def write_model(folder, settings):
    import gpu
    from transformers import AutoConfig

    ends = dict(pad_token_id=0, bos_token_id=None, eos_token_id=2, tie_word_embeddings=False)
    AutoConfig.for_model("llama", **settings, **ends).save_pretrained(folder)
    gpu.make_tokenizer().save_pretrained(folder)


def write_rows(path, count, prompt, response):
    """Pairs of so many words each, a word being a token; the template adds a few."""
    import gpu

    rng = random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            texts = [" ".join(rng.choices(gpu.WORDS, k=k)) for k in (prompt, response, response)]
            ask, *answers = (
                dict(role=role, content=text)
                for role, text in zip(("user", "assistant", "assistant"), texts, strict=True)
            )
            row = dict(prompt=[ask], chosen=[answers[0]], rejected=[answers[1]])
            file.write(json.dumps(row) + "\n")


def train(job, folder):
    """{"cpu", "wall": seconds of a step; "mb"}: this process's, of a run of dpo.py in which every
    row has `length` tokens, a quarter of them the prompt's, and its two responses the rest."""
    import common
    import dpo

    length, rank = job["length"], int(os.environ.get("RANK", 0))
    if rank == 0:
        write_model(folder / "model", job["model"])
        count = job["batch_size"] * (WARM_UP + STEPS)
        write_rows(folder / "rows.jsonl", count, length // 4 - 4, length)  # cut to length
    ends, peaks, log = [], [], common.Run.log

    def note(run, step, metrics):
        log(run, step, metrics)
        ends.append((time.process_time(), time.perf_counter()))
        peaks.append(memory_mb("VmHWM"))

    common.Run.log, before = note, memory_mb("VmRSS")
    common.check_model = lambda *_: None  # it is no part of a step, and takes as long as some
    settings = dict(model=f"{folder}/model", dataset=f"{folder}/rows.jsonl", max_length=length)
    settings |= dict(output_dir=f"{folder}/run", batch_size=job["batch_size"], save_every=0)
    dpo.main(dpo.Args(**settings, tokens_per_micro_batch=job["budget"]))
    steps = [[b - a for a, b in zip(x, x[1:], strict=False)] for x in zip(*ends, strict=True)]
    cpu, wall = (statistics.median(seconds[WARM_UP - 1 :]) for seconds in steps)
    return dict(cpu=cpu, wall=wall, mb=peaks[-1] - before)


def read(job, folder):
    """What the rows cost before and between the steps: "tokenize" and, when that is in the cache,
    "start" and "mb"; "deal": the CPU seconds of a step's rows, dealt and the first batch packed."""
    import torch

    import common
    import data
    import dpo

    args = dpo.Args(dataset=str(folder / "rows.jsonl"), train_split="train", batch_size=64)
    if not Path(args.dataset).exists():
        write_model(folder / "model", MODEL)
        write_rows(Path(args.dataset), job["rows"], 8, 8)
    tokenizer = common.load_tokenizer(str(folder / "model"))
    before, start, wall = memory_mb("VmRSS"), cpu_seconds(), time.perf_counter()
    split, _ = data.tokenize("train", data.encode_pair, tokenizer, args)
    found = dict(cpu=cpu_seconds() - start, wall=time.perf_counter() - wall)
    found["mb"] = memory_mb("VmHWM") - before
    run = SimpleNamespace(rank=0, world_size=1, padded=False, device=torch.device("cpu"))
    start = cpu_seconds()
    for step in range(STEPS):
        next(iter(data.micro_batches(split, step, args, run)))
    return found | dict(deal=(cpu_seconds() - start) / STEPS)


# ---- Processes ----
def in_process(function, job, folder, environment, queue):
    """Puts what a function gives into the queue; what it prints is kept for an error."""
    os.environ.update(environment)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            queue.put(function(job, Path(folder)))
    except BaseException as error:
        queue.put(f"{job}: {type(error).__name__}: {error}\n{said.getvalue()[-2000:]}")
        raise


def measure(function, job, folder, processes=1):
    """What each of the processes gives: forks of a server in which all is imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dpo", "gpu", "transformers.models.llama.modeling_llama"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "bench")])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    places = [dict(RANK=str(rank), WORLD_SIZE=str(processes)) for rank in range(processes)]
    places = [x | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) for x in places]
    queue, started = context.Queue(), []
    for place in places if processes > 1 else [{}]:
        arguments = function, job, str(folder), place, queue
        started.append(context.Process(target=in_process, args=arguments))
        started[-1].start()
    found = [queue.get(timeout=900) for _ in started]
    for process in started:
        process.join()
    errors = [each for each in found if isinstance(each, str)]
    if errors:
        raise SystemExit("\n".join(errors))
    return found


def measure_training(job, processes=1):
    """The sums of the processes' CPU seconds, the longest step, the largest memory."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(train, job, folder, processes)
    cpu, wall, mb = zip(*(each.values() for each in found), strict=True)
    return dict(cpu=sum(cpu), wall=max(wall), mb=max(mb))


def measure_rows(rows):
    """First with nothing in the cache, then with all."""
    with tempfile.TemporaryDirectory() as folder:
        [cold], [warm] = (measure(read, dict(rows=rows), folder) for _ in range(2))
    tokenize = dict(tokenize=cold["cpu"], tokenize_wall=cold["wall"])
    return tokenize | dict(start=warm["cpu"], deal=warm["deal"], mb=warm["mb"])


# ---- What grows ----
PAIR = dict(model=MODEL, length=128, batch_size=1, budget=2**20)


def at_length(length):
    return measure_training(PAIR | dict(length=length))


def at_vocabulary(size):
    return measure_training(PAIR | dict(model=NARROW | dict(vocab_size=size), length=256))


def at_budget(budget):
    return measure_training(PAIR | dict(batch_size=24, budget=budget))


def at_processes(processes):
    return measure_training(PAIR | dict(batch_size=24, budget=1024), processes)


SWEEPS = {  # name: (what a number of the first line is, these numbers, what measures there)
    "Length": ("tokens of a row", [2**n for n in range(8, 14)], at_length),
    "Vocabulary": ("tokens that there are", [2**n for n in range(13, 19)], at_vocabulary),
    "Token budget": ("tokens of a micro-batch", [2**n for n in range(8, 13)], at_budget),
    "Processes": ("processes", [1, 2], at_processes),
    "Rows": ("pairs", [10**n for n in range(2, 7)], measure_rows),
}
LINES = dict(cpu="CPU s of a step", wall="wall s of a step", mb="MB")
LINES |= dict(tokenize="tokenize, CPU s", tokenize_wall="tokenize, wall s")
LINES |= dict(start="read from the cache, CPU s", deal="deal a step's rows, CPU s")


# ---- The page ----
HEAD = """# How cost grows

Written by `python bench/growth.py` from [bench/results/growth.json](../bench/results/growth.json);
no number is typed by hand. Small random models on a CPU, each number of a process of its own in one
thread, and one thing at a time made larger: what a large model or a GPU takes is not here, only how
it grows. The machine may have done other work meanwhile: trust CPU seconds before wall seconds.
Memory is the most that a process had, above what it takes once all is imported. A slope p says that
cost grows as the p-th power: over all columns, and between the last two.
"""
SAYS = {
    "Length": """Attention's pairs of tokens grow with the square of the length, all else with the
tokens. The mask by which a second response sees its prompt is a square, too, and kept in each layer
for backward; on a GPU there is none.""",
    "Vocabulary": """The head's product and the softmax over its logits, which are kept for backward
up to a limit; and 32 bytes of states (weights, gradients and moments of embedding and head) for
each number of the width.""",
    "Token budget": """A step's work is the same, and a small budget pays more often for what a
micro-batch costs whatever its size: operators, metrics and, with several processes, communication.
Memory is what the activations of a micro-batch take, above the states.""",
    "Processes": """They share a step's work and the states. What CPU seconds they take more is
FSDP's copies and communication, which one process leaves out; what keeps wall seconds from falling
by half is that, waiting for the slower one, and want of a free core.""",
    "Rows": """Tokenizing passes over the rows once, in as many processes as there are cores. Each
later start reads a few numbers and a hash of each row, in Python. A step's rows cost the same
however many there are, but for the shuffle, which is made once an epoch.""",
}


def slope(values):
    """The exponent p of y ~ x^p that fits {x: y} best, by least squares of the logarithms."""
    xs, ys = ([math.log(x) for x in part] for part in (values.keys(), values.values()))
    return statistics.linear_regression(xs, ys).slope


def table(name, found):
    """Markdown lines. found: {number, as text: {line: value}}."""
    numbers = [int(number) for number in found]
    header = [SWEEPS[name][0], *(f"{number:,}" for number in numbers), "slope", "at the end"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for key in next(iter(found.values())):
        values = dict(zip(numbers, (each[key] for each in found.values()), strict=True))
        last = dict(list(values.items())[-2:])
        cells = [LINES[key]]
        cells += [f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in values.values()]
        cells += [f"{slope(part):.2f}" for part in (values, last)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(report):
    """docs/growth.md from growth.json."""
    lines = [HEAD, ", ".join(f"{key} {value}" for key, value in report["machine"].items()) + "."]
    for name, found in report["sweeps"].items():
        lines += ["", f"## {name}", "", *table(name, found), "", SAYS[name]]
    return "\n".join([*lines, ""])


def machine():
    """What the numbers were taken on and with."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    names = ("torch", "transformers", "datasets")
    return {name: importlib.metadata.version(name) for name in names} | dict(
        cores=os.cpu_count(),
        commit=subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        date=datetime.date.today().isoformat(),
    )


def measure_all(args):
    """Writes growth.json after each sweep; with --quick it prints tables alone."""
    report = json.loads(RESULTS.read_text()) if args.only and not args.quick else dict(sweeps={})
    report["machine"] = machine()
    for name in args.only or SWEEPS:
        _, numbers, at = SWEEPS[name]
        found = report["sweeps"][name] = {}
        for number in numbers[: 2 if args.quick else None]:
            found[str(number)] = at(number)
            print(name, number, found[str(number)], flush=True)
        print("\n".join(table(name, found)), flush=True)
        if not args.quick:
            RESULTS.write_text(json.dumps(report, indent=1) + "\n")


def main(args):
    if not args.report:
        with tempfile.TemporaryDirectory() as hub:
            os.environ |= dict(HF_HOME=hub, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
            os.environ |= dict(CUDA_VISIBLE_DEVICES="", TQDM_DISABLE="1")
            measure_all(args)
    if not RESULTS.is_file() and args.report:
        raise SystemExit(f"no {RESULTS}: run python bench/growth.py first")
    if not args.quick:
        PAGE.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=SWEEPS, help="measure these again")
    parser.add_argument("--quick", action="store_true", help="two numbers of each, no page")
    parser.add_argument("--report", action="store_true", help="the page from the JSON alone")
    main(parser.parse_args())
