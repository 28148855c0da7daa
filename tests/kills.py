"""Kills real runs at random moments, resumes them, and looks for what was lost:
python tests/kills.py [--kills 60] [--processes 1 2] [--script spo kto sft] [--seed 0] [--warm]

A run is killed up to four times, each time in a phase that is named before, and resumed until it
ends. A kill is SIGKILL to every process group of the run: torchrun's and its workers'. The phases:

    reading      rows are read and tokenized, the model or the checkpoint loaded
    reference    the reference pass, its files included
    training     the steps, and all that is in none of the other phases
    evaluation   of held-out rows, its file included
    checkpoint   from checkpoints/.unfinished until old checkpoints are deleted
    export       as long as there is a folder .export

What the run has written and printed says which phase it is in, and all of its processes are stopped
while that is read: a kill counts for the phase in which it was, not for the one that was meant.

A loss is whatever a finished run has otherwise than one that was never killed (all files and all
their bytes, but for clocks and paths), an export that does not load, a process that is left behind,
or a start that fails or hangs. The exit code is 1 if there is any. Folders of runs with a loss are
kept, with a copy of what each kill left."""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

if __name__ == "__main__":  # before anything reads them; tests have conftest.py
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    hub = tempfile.TemporaryDirectory(prefix="hf-home-")
    os.environ |= dict(HF_HOME=hub.name, HF_HUB_OFFLINE="1")
    os.environ |= dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import tiny
import torch
from launch import command, metrics, run_forked, server, settings
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

PHASES = "reading", "reference", "training", "evaluation", "checkpoint", "export"
EARLY = "reading", "reference"  # before the steps
POLL = 0.004  # seconds: a checkpoint of a tiny model takes some 10 of these, or more
LIMIT = 300  # seconds that a start may take, on a machine that does other things, too
# Every period is another one, so that kills fall between an export and its checkpoint, too.
STEPS, PERIODS = 10, dict(eval_every=2, save_every=2, export_every=3, keep_checkpoints=2)
# The last of these that a run has printed is what it does, unless there is a file that says more.
SIGNS = re.compile(
    r"(?P<reading>no GPU: computing|reference: log-probs of)|(?P<reference>reference: +\d+/)"
    r"|(?P<evaluation>evaluate(?: z0)?: +\d+/)|(?P<training>train: +\d+/)"
    r"|(?P<ended>model written to \S+/run\n|nothing is left to do)"
)
# Files with times or paths in them: they have to be there, and metrics.jsonl is read.
VARYING = "README.md", "config.yaml", "metrics.jsonl", "curves.png"


# ---- Processes ----
def members(token, session):
    """{process id: its group} of what lives of a start: it has inherited the environment's token or
    the session."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            state, _, group, own_session = stat[:4]
            if state not in "ZX" and (
                int(own_session) == session or token in (folder / "environ").read_bytes()
            ):
                found[int(folder.name)] = int(group)
    return found


class Start:
    """A start of a run, followed by what it prints and writes. warm: forks of a server
    that has imported all (launch.Fork) take the place of new interpreters, which saves time."""

    def __init__(self, script, options, processes, folder, warm=False):
        self.out, self.begun, self.seen, self.sign = folder / "run", time.time(), "", ""
        number = len(list(folder.glob("start-*.log")))
        log = folder / f"start-{number}.log"
        log.touch()
        self.token, self.log = f"KILLS_START={log}".encode(), open(log, newline="")
        start = command(f"{script}.py", options, processes if processes > 1 else 0)
        own = dict(PYTHONUNBUFFERED="1", KILLS_START=str(log))
        own["TQDM_MININTERVAL"] = "0"  # every step says where it is
        if warm:
            how = start[1:], [str(log), str(log)], os.getcwd(), os.environ | own
            self.process = server().Process(target=run_forked, args=how)
            self.process.start()
        else:
            how = dict(stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)
            with open(log, "a") as file:
                self.process = subprocess.Popen(start, stdout=file, env=os.environ | own, **how)
        self.warm = warm

    def exit_code(self):
        """None while it runs."""
        return self.process.exitcode if self.warm else self.process.poll()

    def members(self):
        return members(self.token, self.process.pid)

    def freeze(self):
        """Stops all of its processes, also those that are made meanwhile."""
        frozen = set()
        while new := self.members().keys() - frozen:
            for process in new:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGSTOP)
            frozen |= new

    def signal_groups(self, number):
        for group in set(self.members().values()) - {os.getpgrp()}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)

    def end(self):
        """SIGKILL to all of it. Returns the command lines of what lives on."""
        self.signal_groups(signal.SIGKILL)
        self.process.join() if self.warm else self.process.wait()
        return self.left_behind()

    def left_behind(self):
        """The command lines of its processes that do not end by themselves within seconds."""
        deadline = time.monotonic() + 20
        while (left := self.members()) and time.monotonic() < deadline:
            time.sleep(0.05)
        names = [(Path("/proc") / str(process) / "cmdline") for process in left]
        found = [name.read_text().replace("\0", " ") for name in names if name.exists()]
        self.signal_groups(signal.SIGKILL)  # else they would disturb the next start
        return found

    def fresh(self, path):
        """Whether this start has written to a folder; an earlier one may have left it."""
        try:
            return path.stat().st_mtime > self.begun
        except FileNotFoundError:
            return False

    def phase(self):
        """What it does now: one of PHASES, "ended", or "" for what comes before all of them."""
        self.seen = self.seen[-200:] + self.log.read()
        for match in SIGNS.finditer(self.seen):
            self.sign = match.lastgroup
        if any(map(self.fresh, [self.out / ".export", *self.out.glob("models/*/.export")])):
            return "export"
        saved = self.out / "checkpoints"
        too_many = len(list(saved.glob("step-*"))) > PERIODS["keep_checkpoints"]
        if self.fresh(saved / ".unfinished") or (too_many and self.fresh(saved)):
            return "checkpoint"
        return self.sign

    def step(self):
        """The last step in metrics.jsonl, or -1."""
        try:
            steps = re.findall(r'^{"step": (\d+),', (self.out / "metrics.jsonl").read_text(), re.M)
        except FileNotFoundError:
            steps = []
        return int(steps[-1]) if steps else -1


# ---- A run that is killed ----
class Case:
    """A run in a folder of its own, with its own copy of the rows: what is tokenized is kept under
    a file's path, and every run has to tokenize."""

    def __init__(self, script, processes, world, folder, warm=False):
        self.script, self.processes, self.folder, self.warm = script, processes, folder, warm
        folder.mkdir(parents=True)
        shutil.copytree(world / "data", folder / "data")
        self.options = settings(world, folder / "run", max_steps=STEPS, **PERIODS)
        self.options["dataset"] = str(folder / "data")
        if script == "sft":
            self.options |= dict(train_split="train_sft", eval_split="test_sft")
        self.kills, self.losses, self.last = [], [], None

    def start(self):
        """Starts it, and resumes it from the second time on, however little it has written."""
        options = self.options | (dict(resume=True) if self.last else {})
        self.last = Start(self.script, options, self.processes, self.folder, self.warm)
        return self.last

    def finish(self, durations=None):
        """Resumes it, and waits until it ends. durations: {phase: a list of seconds}."""
        start, phase, since = self.start(), "", time.monotonic()
        deadline = since + LIMIT
        while start.exit_code() is None and time.monotonic() < deadline:
            time.sleep(POLL if durations is not None else 0.05)
            if durations is not None and (now := start.phase()) != phase:
                durations[phase].append(time.monotonic() - since)
                phase, since = now, time.monotonic()
        self.check_end(start)

    def check_end(self, start):
        """Notes a start that failed or hung, and processes that outlive it."""
        code = start.exit_code()
        if code is None:
            self.losses.append(f"hangs in phase {start.phase()!r}, step {start.step()}")
            start.end()
        elif code:
            self.losses.append(f"exit code {code}: {self.last_words()}")
        self.losses += [f"left behind at its end: {name}" for name in start.left_behind()]

    def last_words(self):
        logs = sorted(self.folder.glob("start-*.log"), key=lambda path: int(path.stem[6:]))
        return " | ".join(logs[-1].read_text().strip().splitlines()[-3:])

    def kill(self, phase, after, delay):
        """Resumes it, and kills it in this phase, once step `after` is in the log, so many seconds
        after the phase began. Returns False if the run ends before."""
        start, deadline = self.start(), time.monotonic() + LIMIT
        while start.exit_code() is None and time.monotonic() < deadline:
            if start.phase() == phase and start.step() >= after:
                until = time.monotonic() + delay
                while time.monotonic() < until and start.phase() == phase:
                    time.sleep(min(POLL, delay))
                start.freeze()
                now = start.phase()
                # What comes once in a start is not waited for: that is a kill in the next phase.
                if now == phase or (phase in EARLY and now in PHASES):
                    self.note_kill(start, now)
                    return True
                start.signal_groups(signal.SIGCONT)
                delay /= 2  # shorter, where the phase has ended in the meantime
            time.sleep(POLL)
        self.check_end(start)
        return False

    def close(self):
        """Ends what runs."""
        if self.last and self.last.exit_code() is None:
            self.last.end()

    def note_kill(self, start, phase):
        """Kills the frozen start, and copies what it leaves."""
        step, left = start.step(), start.end()
        self.losses += [f"left behind by a kill: {name}" for name in left]
        copy = self.folder / f"after-kill-{len(self.kills) + 1}"
        for name in ("run", "reference"):
            if (self.folder / name).is_dir():
                shutil.copytree(self.folder / name, copy / name)
        hidden = [name for name in files_of(copy) if is_hidden(name)]
        self.kills.append(dict(phase=phase, step=step, hidden=hidden))

    def compare(self, whole):
        """Notes all in which it differs from the run that was never killed."""
        expected, found = (set(files_of(case.folder)) for case in (whole, self))
        self.losses += [f"{name} is missing" for name in sorted(expected - found)]
        self.losses += [f"{name} is left over" for name in sorted(found - expected)]
        for name in sorted(expected & found):
            if Path(name).name not in VARYING:
                if not same_content(self.folder / name, whole.folder / name):
                    self.losses.append(f"{name} has other bytes")
        self.losses += compare_metrics(whole.folder / "run", self.folder / "run")
        for export in [self.folder / "run", *self.folder.glob("run/models/*")]:
            if problem := why_not_loaded(export):
                self.losses.append(f"{export} does not load: {problem}")

    def report(self):
        """The losses and how they came about, in lines."""
        kills = [f"{kill['phase']} at step {kill['step']}" for kill in self.kills]
        lines = [f"{self.script}.py, {self.processes} processes, killed in: {', '.join(kills)}"]
        lines += [f"    LOSS {loss}" for loss in self.losses]
        for number, kill in enumerate(self.kills, 1):
            if kill["hidden"]:
                lines.append(f"    left by kill {number}: {', '.join(kill['hidden'])}")
        return "\n".join([*lines, f"    see {self.folder}"])


def files_of(folder):
    """Files and empty folders of a run and its reference, relative, without the lock."""
    paths = [path for name in ("run", "reference") for path in (folder / name).rglob("*")]
    kept = [path for path in paths if path.is_file() or not any(path.iterdir())]
    return sorted(str(path.relative_to(folder)) for path in kept if path.name != ".lock")


def same_content(one, other):
    """Of two files: the same bytes; or of safetensors, which a checkpoint pads differently each
    time, the same bytes of each tensor, and of state.json all but the checksums of such files."""
    if one.read_bytes() == other.read_bytes():
        return True
    if one.name == "state.json":
        states = [json.loads(path.read_text()) for path in (one, other)]
        names = [state.pop("files").keys() for state in states]
        return states[0] == states[1] and names[0] == names[1]
    if one.suffix != ".safetensors" or "checkpoints" not in one.parts:
        return False
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype
        and torch.equal(*(values[name].reshape(-1).view(torch.uint8) for values in (ours, theirs)))
        for name in ours
    )


def is_hidden(name):
    return any(part.startswith(".") for part in Path(name).parts)


def compare_metrics(whole, killed):
    """What is wrong with the lines of metrics.jsonl: each step comes once, with the same values."""
    try:
        lines = [
            [{k: v for k, v in line.items() if "per_second" not in k} for line in metrics(folder)]
            for folder in (whole, killed)
        ]
    except (OSError, ValueError) as error:
        return [f"metrics.jsonl: {error}"]
    if lines[0] == lines[1]:
        return []
    steps = [[line["step"] for line in part] for part in lines]
    return [f"metrics.jsonl has other values, or steps {steps[1]} and not {steps[0]}"]


def why_not_loaded(folder):
    """Why transformers does not load an export, or None."""
    try:
        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever a broken folder raises
        return f"{type(error).__name__}: {error}"
    return next((f"{name}: {found}" for name, found in info.items() if found), None)


# ---- Many of them ----
class Kills:
    """Runs of some scripts on some numbers of processes, with what is known of each."""

    def __init__(self, world, folder, seed=0, warm=False):
        self.world, self.folder, self.warm = Path(world), Path(folder), warm
        self.random, self.cases = random.Random(seed), []
        self.wholes = {}  # {(script, processes): a Case that was never killed}
        # {(script, processes): {phase: the seconds of each time that it came}}
        self.durations = defaultdict(lambda: defaultdict(list))

    def whole(self, script, processes):
        """The run that is never killed."""
        key = script, processes
        if key not in self.wholes:
            self.wholes[key] = self.case(*key, f"{script}-{processes}-whole")
            self.wholes[key].finish(self.durations[key])
            problem = self.wholes[key].losses
            assert not problem, problem
        return self.wholes[key]

    def case(self, script, processes, name):
        return Case(script, processes, self.world, self.folder / name, self.warm)

    def run(self, script, processes, phases):
        """Kills a run in each of the phases, in this order, resumes it to its end, and compares.
        Returns the Case, whose `kills` lacks the phases that it had passed before."""
        whole = self.whole(script, processes)
        case = self.case(script, processes, f"{script}-{processes}-{len(self.cases)}")
        self.cases.append(case)
        durations, step = self.durations[script, processes], -1
        for place, phase in enumerate(phases):
            # Some way on, but so that steps are left for the kills to come.
            most = step + (STEPS - 1 - step) // (len(phases) - place)
            after = -1 if phase in EARLY else self.random.randint(step, max(step, most))
            delay = self.random.uniform(0, self.random.choice(durations[phase] or [0.1]))
            if not case.kill(phase, after, delay):
                break
            step = max(step, case.kills[-1]["step"])
        else:
            case.finish()
        case.compare(whole)
        if not case.losses:
            shutil.rmtree(case.folder)
        return case

    def close(self):
        """Ends what runs."""
        for case in [*self.cases, *self.wholes.values()]:
            case.close()

    def counts(self):
        """Counter of (phase, number of processes)."""
        pairs = ((kill, case) for case in self.cases for kill in case.kills)
        return Counter((kill["phase"], case.processes) for kill, case in pairs)


def some_of(wanted, script, chooser):
    """Up to four phases of the Counter `wanted`, in an order in which a run can meet them."""
    left = [p for p in wanted.elements() if script != "sft" or p != "reference"]
    phases = chooser.sample(left, min(len(left), chooser.randint(1, 4)))
    # After the reference pass there is none in that run, but each start reads.
    early = [phase for phase in phases if phase == "reference"]
    return early + [phase for phase in phases if phase != "reference"]


def kill_many(kills, args):
    """Spreads the kills evenly over phases and numbers of processes. Prints losses as they come."""
    phases = [phase for phase in PHASES if args.script != ["sft"] or phase != "reference"]
    places = list(itertools.product(phases, args.processes))
    wanted = defaultdict(Counter)
    for phase, processes in itertools.islice(itertools.cycle(places), args.kills):
        wanted[processes][phase] += 1
    turns = itertools.cycle(itertools.product(args.script, args.processes))
    with tqdm(total=args.kills, desc="kills", unit="kill") as bar:
        # A run may end before the kill that was meant for it: another try, but not for ever.
        for script, processes in itertools.islice(turns, 10 + 3 * args.kills):
            if not any(counter.total() for counter in wanted.values()):
                break
            chosen = some_of(wanted[processes], script, kills.random)
            if not chosen:
                continue
            case = kills.run(script, processes, chosen)
            wanted[processes] -= Counter(kill["phase"] for kill in case.kills)
            bar.update(len(case.kills))
            if case.losses:
                tqdm.write(case.report())


def table(kills, numbers):
    """Kills by phase and number of processes, as text."""
    counts = kills.counts()
    header = [f"{number} process{'es' * (number > 1)}" for number in numbers]
    lines = [["phase", *header]]
    for phase in PHASES:
        lines.append([phase, *(str(counts[phase, number]) for number in numbers)])
    lines.append(["all", *(str(sum(counts[p, n] for p in PHASES)) for n in numbers)])
    return "\n".join(f"{name:12}" + "".join(f"{x:>14}" for x in cells) for name, *cells in lines)


def make_world(folder):
    """A model and rows, enough of them that several processes tokenize."""
    tiny.model(folder / "llama")
    data = folder / "data"
    data.mkdir()
    for name, count in (("train", 1000), ("test", 40)):
        tiny.pairs(data / f"{name}_prefs.jsonl", count, seed=count)
        tiny.chats(data / f"{name}_sft.jsonl", count, seed=count + 1)
    return folder


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--script", nargs="+", default=["spo", "kto", "sft"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="empty folder for the runs, default: temporary")
    help = "forks of one interpreter instead of python and torchrun: two or three times as fast"
    parser.add_argument("--warm", action="store_true", help=help)
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    kills = Kills(make_world(folder / "world"), folder, args.seed, args.warm)
    with contextlib.closing(kills), contextlib.suppress(KeyboardInterrupt):
        kill_many(kills, args)
    print(table(kills, args.processes))  # also of a part, after Ctrl-C
    lost = [case for case in kills.cases if case.losses]
    missed = max(0, args.kills - kills.counts().total())  # a run's last kills may be more
    for case in lost:
        (case.folder / "losses.json").write_text(json.dumps([case.kills, case.losses], indent=2))
    minutes = (time.monotonic() - begun) / 60
    print(f"{len(lost)} of {len(kills.cases)} runs lost something, {minutes:.0f} minutes")
    if missed:
        print(f"{missed} kills are missing: interrupted, or too late for their phase")
    if not lost:
        shutil.rmtree(folder)
    return 1 if lost or missed else 0


if __name__ == "__main__":
    sys.exit(main())
