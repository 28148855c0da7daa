"""From verdicts to figures: the numbers, tables, page and exports of eval_judge.py.

    score = mean of the two verdicts of a prompt, 1, 1/2 or 0, with each response shown first
    cell  = 100 * mean of the scores of n prompts, standard error 100 * sd(scores) / sqrt(n)

A response is a line as eval_judge.generate_all makes it. A question is a dict with the uid, the
category (None where the rows have none) and the text of a prompt. A model whose name is "run@100"
is that of a run's step 100.
"""

import base64
import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np

import common
import files
from eval_endpoint import plain

# Two wins and two losses that intervals are made with, too (Agresti and Coull, 1998). The interval
# of 50 wins in 50 prompts would have no width without them.
ADDED = [1.0, 1.0, 0.0, 0.0]


# ---- Statistics ----
def win_rate(scores):
    """Mean and standard error, in percent, of scores (n,) in [0, 1]."""
    return 100 * scores.mean(), 100 * scores.std(ddof=1) / len(scores) ** 0.5


def sign_flip_p(scores):
    """Exact two-sided p-value of "no difference" (Fisher's randomization test): how likely a mean
    as far from 1/2 is if each score s may as well be 1 - s. scores: (n,), multiples of 1/4."""
    quarters = np.rint(4 * scores - 2).astype(int)
    chances = np.ones(1)  # of all sums of quarters, the lowest first
    for size in np.abs(quarters):
        chances = (np.pad(chances, (0, 2 * size)) + np.pad(chances, (2 * size, 0))) / 2
    sums = np.arange(len(chances)) - len(chances) // 2
    return float(chances[np.abs(sums) >= abs(quarters.sum())].sum())


def interval(scores):
    """The 95 % interval of a win rate, in percent, from scores (n,). Holds near 0 and 100, too."""
    scores = np.append(scores, ADDED)
    middle, error = scores.mean(), 1.96 * scores.std() / len(scores) ** 0.5
    return (100 * np.clip([middle - error, middle + error], 0, 1)).tolist()


def fit_lengths(x, scores, counts):
    """The weights of logit P(win) = w x + w_0 that fit the scores best, the w_0 of each cell and
    the w of all, and their standard errors (cells + 1,): those of a sandwich estimator that takes
    the cells' scores of a prompt as one. x, scores, counts, 0 or 1: (cells, n)."""
    weights, ridge = np.zeros(len(x) + 1), 1e-3  # a ridge keeps the weights of sure wins finite
    for _ in range(50):  # Newton's method
        p = 1 / (1 + np.exp(-weights[:-1, None] - weights[-1] * x))  # (cells, n)
        error, spread = counts * (p - scores), counts * p * (1 - p)
        slopes = np.vstack([error, (error * x).sum(axis=0)])  # (cells + 1, n)
        curvature = np.diag(np.append(spread.sum(axis=1), (spread * x * x).sum()) + ridge)
        curvature[-1, :-1] = curvature[:-1, -1] = (spread * x).sum(axis=1)
        inverse = np.linalg.inv(curvature)
        step = inverse @ (slopes.sum(axis=1) + ridge * weights)
        weights -= step.clip(-1, 1)  # where the curvature vanishes, a whole step would overshoot
        if np.abs(step).max() < 1e-9:
            break
    return weights, np.sqrt(np.square(inverse @ slopes).sum(axis=1))


def length_controlled(scores, gaps):
    """For each cell the win rate in percent as with responses of equal length, its 95 % interval
    and p. It is 100 sigmoid(w_0) of logit P(win) = w tanh(gap / sd) + w_0: AlpacaEval's formulation
    (arXiv:2404.04475v2) without instruction difficulty, and with one w for all cells: where nearly
    all responses of a model are the longer ones, a cell by itself cannot tell length from quality.
    scores: (cells, n), nan where missing. gaps: (cells, n), characters of theirs less ours."""
    sd = gaps.std(axis=1, ddof=1, keepdims=True)
    x = np.tanh(gaps / np.where(sd > 0, sd, np.inf))
    known, scores = ~np.isnan(scores), np.nan_to_num(scores)
    rates = 100 / (1 + np.exp(-fit_lengths(x, scores, known)[0][:-1]))
    added = np.tile(ADDED, (len(x), 1))
    x, scores = np.hstack([x, 0 * added]), np.hstack([scores, added])
    weights, errors = fit_lengths(x, scores, np.hstack([known, added >= 0]))
    cells = []
    for rate, w_0, error in zip(rates, weights[:-1], errors[:-1], strict=True):
        middle = 1 / (1 + math.exp(-w_0))
        ends = middle + np.array([-1.96, 1.96]) * error * middle * (1 - middle)
        low, high = (100 * ends.clip(0, 1)).tolist()
        p = math.erfc(abs(w_0 / error) / 2**0.5)  # of a normal test
        cells.append(dict(length_controlled=float(rate), lc_low=low, lc_high=high, lc_p=p))
    return cells


def score(both):
    """A prompt's score for the row. both: the verdicts of the two orders, None where one is
    missing, or [] where the responses are identical."""
    worth = {"a": 1.0, "b": 0.0, "tie": 0.5, None: math.nan}  # to the response shown first
    return (worth[both[0]] + 1 - worth[both[1]]) / 2 if both else 0.5


def compare(found, lengths, categories=1):
    """{(row, column): figures} of the pairs, but for those of fewer than two prompts. found:
    {(row, column): for each prompt its verdicts, as `score` takes them}. lengths: {name: (n,)}, in
    characters. categories: how many such comparisons there are."""
    scores = np.array([[score(both) for both in prompts] for prompts in found.values()])
    gaps = np.stack([lengths[column] - lengths[row] for row, column in found])
    controlled, cells = length_controlled(scores, gaps), {}
    for (pair, prompts), own, gap, lc in zip(found.items(), scores, gaps, controlled, strict=True):
        known = own[~np.isnan(own)]
        if len(known) < 2:
            continue
        rate, error = win_rate(known)
        low, high = interval(known)
        cell = dict(n=len(known), win_rate=rate, standard_error=error, low=low, high=high)
        cell |= dict(p=sign_flip_p(known)) | lc | habits(prompts)
        for name in ("", "lc_"):  # Bonferroni's correction
            cell[f"{name}significant"] = cell[f"{name}p"] * len(found) * categories < 0.05
        far_apart = bool(abs(gap.mean()) > gap.std(ddof=1))  # no prompts are like equal lengths
        cells[pair] = cell | dict(lc_doubtful=not 25 <= rate <= 75 or far_apart, verdicts=prompts)
    return cells


def mirrored(cell):
    """The cell of the column against the row."""
    names = dict(win_rate="win_rate", low="high", high="low", lc_low="lc_high", lc_high="lc_low")
    names["length_controlled"] = "length_controlled"
    rates = {name: 100 - cell[other] for name, other in names.items()}
    return cell | rates | {"verdicts": [both[::-1] for both in cell["verdicts"]]}


def habits(found):
    """How a judge judges. In percent, of the verdicts that there are: ties, prompts whose orders
    disagree (flips), how often it prefers the first response where it prefers one (50 is fair).
    missing: the number of such verdicts. identical: that of prompts with identical responses."""
    counts = Counter(verdict for both in found for verdict in both)
    both = [tuple(pair) for pair in found if pair and None not in pair]
    flips = sum(pair not in (("a", "b"), ("b", "a"), ("tie", "tie")) for pair in both)
    shares = dict(ties=(counts["tie"], counts.total() - counts[None]), flips=(flips, len(both)))
    shares["first"] = counts["a"], counts["a"] + counts["b"]
    percent = {f"{name}_percent": 100 * x / max(1, n) for name, (x, n) in shares.items()}
    return percent | dict(missing=counts[None], identical=found.count([]))


def describe(lines):
    """A model's responses in figures: mean tokens and characters, percentages, entropy in nats a
    token, and distinct_n: different n-grams of words, as a share of all. None is what a file of
    responses does not say."""
    texts = [line["response"] for line in lines]
    figures = dict(tokens=None, characters=sum(map(len, texts)) / len(lines), cut_percent=None)
    figures["empty_percent"] = 100 * sum(not text.strip() for text in texts) / len(lines)
    figures["entropy"] = None
    if lines[0]["tokens"] is not None:
        tokens = sum(line["tokens"] for line in lines)
        figures["tokens"] = tokens / len(lines)
        figures["cut_percent"] = 100 * sum(line["cut"] for line in lines) / len(lines)
        figures["entropy"] = sum(line["entropy"] for line in lines) / tokens
    for n in (1, 2):
        grams = []
        for text in texts:
            words = text.split()
            grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        figures[f"distinct_{n}"] = len(set(grams)) / max(1, len(grams))
    return figures


# ---- Report ----
def step_of(name):
    """The step of a model "run@100", or None."""
    return int(name.partition("@")[2]) if "@" in name else None


def make_report(judge, cells, verdicts, responses, questions, args):
    """All figures, as report.json holds them. cells: {(row, column): for each prompt the keys of
    its verdicts}."""
    found = {}
    for pair, prompts in cells.items():
        found[pair] = [[verdicts.get(x, {}).get("verdict") for x in keys] for keys in prompts]
    lengths = {}
    for name, lines in responses.items():
        lengths[name] = np.array([len(line["response"]) for line in lines])
    compared = compare(found, lengths)
    if len(compared) < len(cells):
        common.fail("fewer than two prompts have both verdicts")
    kinds, categories = Counter(question["category"] for question in questions), {}
    shown = [kind for kind, n in kinds.items() if kind is not None and 2 <= n < len(questions)]
    for kind in shown:
        places = [i for i, question in enumerate(questions) if question["category"] == kind]
        part = {pair: [prompts[i] for i in places] for pair, prompts in found.items()}
        part = compare(part, {name: x[places] for name, x in lengths.items()}, len(shown))
        categories[kind] = as_matrix(part, responses)
    report = dict(settings=vars(args), pairs=list(cells), groups=groups(responses, args.baseline))
    report["models"] = {name: describe(lines) for name, lines in responses.items()}
    report |= dict(matrix=as_matrix(compared, responses), categories=categories)
    judge = habits(sum(found.values(), [])) | {"failed_tries": dict(Counter(judge.faults))}
    return report | {"judge": judge | tokens_of(verdicts, args)}


def as_matrix(cells, names):
    """{row: {column: figures}}, with both cells of each pair."""
    matrix = {name: {} for name in names}
    for (row, column), cell in cells.items():
        for a, b, figures in ((row, column, cell), (column, row, mirrored(cell))):
            matrix[a][b] = figures | {"shown": shown(figures)}
    return matrix


def groups(names, baseline):
    """{heading: names} of the matrices: one for each step, in all of which the models without a
    step are, too; but a single column against a baseline."""
    steps = sorted({step_of(name) for name in names if "@" in name}) if not baseline else []
    found = {f"step {x}": [name for name in names if step_of(name) in (x, None)] for x in steps}
    return found or {"": list(names)}


def tokens_of(verdicts, args):
    """The tokens that the judge has read and written for the verdicts, as its server counts them,
    and where there are prices their cost."""
    usages = [line["usage"] for line in verdicts.values() if isinstance(line.get("usage"), dict)]
    totals = []
    for name in ("prompt_tokens", "completion_tokens"):
        counts = [usage.get(name) for usage in usages]
        totals.append(sum(count for count in counts if isinstance(count, int)))
    cost = (totals[0] * args.price_in + totals[1] * args.price_out) / 1e6
    figures = dict(tokens_read=totals[0], tokens_written=totals[1], cost=cost)
    return {name: x for name, x in figures.items() if x}


def tenths(percent):
    """A percentage with one decimal. Of two that add up to 100 the smaller one is rounded, so that
    they still do; to nine decimals first, as 100 - x has an error of its own."""
    small = round(round(min(percent, 100 - percent), 9), 1)
    return f"{small if percent <= 50 else 100 - small:.1f}"


def shown(cell):
    """A cell's two rates as they are printed and shown on the page."""
    ends = "[{}, {}]".format(*map(tenths, (cell["low"], cell["high"])))
    raw = f"{tenths(cell['win_rate'])} ± {tenths(cell['standard_error'])} {ends}"
    ends = "[{}, {}]".format(*map(tenths, (cell["lc_low"], cell["lc_high"])))
    controlled = f"{tenths(cell['length_controlled'])} {ends}" + "*" * cell["lc_significant"]
    return {
        "win_rate": raw + "*" * cell["significant"],
        "length_controlled": controlled + "?" * cell["lc_doubtful"],
    }


def figure(name, x):
    """A value as it is printed and shown on the page."""
    if x is None:
        return "–"
    if isinstance(x, dict):
        return ", ".join(f"{count} x {what}" for what, count in x.items()) or "none"
    if not isinstance(x, float):
        return str(x)
    if re.search("percent|rate|error|controlled", name):
        return tenths(x)
    digits = {"tokens": ".1f", "characters": ".1f", "cost": ".2f"}
    return f"{x:{digits.get(name, '.3g')}}"


def tables(report):
    """{name: rows of text, the header first} of the models, the pairs and the judge."""
    models = [{"model": name} | figures for name, figures in report["models"].items()]
    names = "n win_rate standard_error length_controlled p ties_percent flips_percent first_percent"
    names, pairs = [*names.split(), "missing", "identical"], []
    for row, column in report["pairs"]:
        cell = report["matrix"][row][column]
        pairs.append({"pair": f"{row} : {column}"} | {name: cell[name] for name in names})
    found = dict(models=models, pairs=pairs, judge=[report["judge"]])
    return {title: as_text(rows) for title, rows in found.items()}


def as_text(rows):
    """Dicts of the same names as rows of text, the first of which has the names."""
    header = [name.replace("_percent", ", %").replace("_", " ") for name in rows[0]]
    return [header, *([figure(*item) for item in row.items()] for row in rows)]


def table(rows):
    """Rows of text as a Markdown table."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def grid(matrix, names, baseline):
    """The rows of a matrix, or of the two columns against a baseline, as text."""
    header, columns = ["row against column", *names], [(name, "win_rate") for name in names]
    if baseline:
        names = [name for name in names if name != baseline]
        columns = [(baseline, kind) for kind in ("win_rate", "length_controlled")]
        header = [f"against {baseline}", "win rate", "length-controlled"]
    rows = [header]
    for row in names:
        cells = matrix[row]
        texts = [cells[name]["shown"][kind] if name in cells else "–" for name, kind in columns]
        rows.append([row, *texts])
    return rows


def markdown(report):
    """The report as it is printed."""
    text, baseline = tables(report), report["settings"]["baseline"]
    rates = "Win rate in %, ± standard error, [95 % interval, not corrected for many"
    parts = [table(text["models"]), f"{rates} pairs]; * significant at 5 % (Bonferroni)"]
    for kind, matrix in {"": report["matrix"], **report["categories"]}.items():
        for group, names in report["groups"].items():
            title = ", ".join(filter(None, (group, kind and f"category {plain(str(kind))}")))
            parts += [f"\n{title}"] * bool(title) + [table(grid(matrix, names, baseline))]
    controlled = "Length-controlled: AlpacaEval's formulation without instruction difficulty, with"
    controlled += " one weight of length for all pairs; ? to be doubted, as the win rate is outside"
    controlled += " 25 to 75 % or the lengths are more than a standard deviation apart"
    parts += [controlled, table(text["pairs"])]
    return "\n".join([*parts, "The judge, over all pairs", table(text["judge"])])


def curves(report):
    """{run: points, by step} of "run@step" models: win rate (the mean over their opponents),
    entropy and tokens."""
    runs, baseline = {}, report["settings"]["baseline"]
    names = [name for name in report["models"] if "@" in name and name != baseline]
    for name in sorted(names, key=step_of):
        rates = [cell["win_rate"] for cell in report["matrix"][name].values()]
        if rates:
            figures = {key: report["models"][name][key] for key in ("entropy", "tokens")}
            point = dict(step=step_of(name), win_rate=sum(rates) / len(rates)) | figures
            runs.setdefault(name.partition("@")[0], []).append(point)
    return runs


def write_report(report, questions, responses, args):
    """Writes report.json, and report.html: a page that loads nothing and runs no script but its
    own. Texts are in it as JSON without "<", so they can neither end their element nor open one."""
    folder = Path(args.output_dir)
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False))
    texts = {name: [line["response"] for line in lines] for name, lines in responses.items()}
    # A script would sort the keys of an object that are whole numbers, so names come as a list.
    content = report | dict(names=list(responses), tables=tables(report), curves=curves(report))
    content |= dict(prompts=[question["prompt"] for question in questions], responses=texts)
    page, content = Path(__file__).with_suffix(".html").read_text(), json.dumps(content)
    for tag in ("style", "script"):
        inside = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        allowed = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        page = page.replace(f"{{{{{tag}}}}}", f"'sha256-{allowed}'")
    (folder / "report.html").write_text(page.replace("{{data}}", content.replace("<", "\\u003c")))


# ---- Exports ----
def write_outputs(questions, responses, args):
    """The responses in AlpacaEval's format, and as a folder for the data/ of Arena-Hard, whose
    scripts know its own categories alone."""
    outputs, arena = Path(args.output_dir) / "model_outputs", Path(args.output_dir) / "arena_hard"
    for folder in (outputs, arena / "model_answer"):
        folder.mkdir(parents=True, exist_ok=True)
    read = [Path(model.partition("=")[2]).resolve() for model in args.models]
    known = [dict(x, category=x["category"] or "hard_prompt") for x in questions]
    write_lines(arena / "question.jsonl", known)
    for name, lines in responses.items():
        rows, answers = [], []
        for question, line in zip(questions, lines, strict=True):
            text, answer = question["prompt"], line["response"]
            rows.append(dict(instruction=text, output=answer, generator=name))
            turns = [dict(role="user", content=text)]
            turns.append(dict(role="assistant", content={"answer": answer}))
            style = {"token_len": line["tokens"] or len(answer) // 4} | markdown_counts(answer)
            answers.append(dict(uid=question["uid"], model=name, messages=turns, metadata=style))
        path = outputs / f"{name}.json"
        if path.resolve() not in read:  # an answer file, which may have answers to other prompts
            with files.atomic_write(path) as unfinished:
                unfinished.write_text(json.dumps(rows, indent=1))
        write_lines(arena / "model_answer" / f"{name}.jsonl", answers)


def markdown_counts(text):
    """The Markdown outside of code blocks, as Arena-Hard's utils/add_markdown_info.py counts it."""
    text = re.sub("```[^`]*```", "", text)

    def count(pattern):
        return len(re.findall(pattern, text, re.MULTILINE))

    return {
        "header_count": {f"h{n}": count(rf"^#{{{n}}}\s") for n in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def write_lines(path, rows):
    """A JSON lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def agreement(found, labels, seed):
    """How far a judge agrees with labels: the percentage of pairs with the same outcome and Cohen's
    kappa (Educational and Psychological Measurement 20, 1960), with standard errors by bootstrap.
    found, labels: (n pairs, 2) verdicts, with each response shown first; None is missing. Outcomes
    are the first response wins, loses or ties, over both orders. {} where there is no pair."""
    worth = {"a": 1, "tie": 0, "b": -1}
    table = np.zeros((3, 3), dtype=int)  # pairs, by the judge's outcome and the label's
    for both, label in zip(found, labels, strict=True):
        if None not in both:
            ours, theirs = (np.sign(worth[x] - worth[y]) for x, y in (both, label))
            table[1 + ours, 1 + theirs] += 1
    n = table.sum()
    if n == 0:
        return {}
    draws = np.random.default_rng(seed).multinomial(n, table.ravel() / n, size=2000)
    shares = np.vstack([table.ravel(), draws]).reshape(-1, 3, 3) / n
    same = shares.trace(axis1=1, axis2=2)  # (2001,)
    by_chance = (shares.sum(axis=1) * shares.sum(axis=2)).sum(axis=1)
    known = by_chance < 1  # not where both give all pairs one outcome
    kappa = (same - by_chance)[known] / (1 - by_chance)[known]
    figures = dict(labelled=int(n), agreement_percent=100 * float(same[0]))
    figures["agreement_se"] = 100 * float(same[1:].std(ddof=1))
    defined = known[0] and len(kappa) > 2
    figures["kappa"] = float(kappa[0]) if defined else None
    return figures | {"kappa_se": float(kappa[1:].std(ddof=1)) if defined else None}
