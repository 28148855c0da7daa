"""Evaluation: its figures, against hand-made and published ones, and the page that shows them."""

import base64
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny

import eval_judge
import eval_report

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "judge" / "alpaca_eval1_dpo.json"
BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
CHROMIUM = next(filter(None, BROWSERS), None)


def test_win_rate_and_standard_error_by_hand():
    """Scores 1, 1/2, 0, 1: mean 5/8, squared deviations (9 + 1 + 25 + 9) / 64, so the variance is
    11/48."""
    rate, error = eval_report.win_rate(np.array([1, 0.5, 0, 1]))
    assert rate == 62.5
    assert error == pytest.approx(100 * math.sqrt(11 / 48 / 4), rel=1e-12)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published verdicts are not shipped")
def test_published_win_rates():
    models = json.loads(PUBLISHED.read_text())["models"]
    checked = 0
    for name, model in models.items():
        worth = {0: 0.5, 1: 0, 1.5: 0.5, 2: 1}
        scores = np.array([worth[float(x)] for x in model["preference"] if x is not None])
        if model["published"]:
            published = [float(model["published"][x]) for x in ("win_rate", "standard_error")]
            assert eval_report.win_rate(scores) == pytest.approx(published, abs=1e-4), name
            checked += 1
    assert checked == 8


def test_sign_flip_p_by_hand():
    assert eval_report.sign_flip_p(np.ones(5)) == 2 / 32  # all heads or all tails
    assert eval_report.sign_flip_p(np.full(9, 0.5)) == 1
    # Of the sums 3, 1, -1, -3 two are as far out.
    assert eval_report.sign_flip_p(np.array([1, 0.75])) == 0.5
    assert eval_report.sign_flip_p(np.array([0, 0.25])) == 0.5
    # The sums are +-4 twice, +-2 eight times.
    assert eval_report.sign_flip_p(np.array([1, 1, 1, 0])) == 10 / 16
    assert eval_report.sign_flip_p(np.ones(2000)) < 1e-300


def controlled(scores, ours, theirs):
    scores, gaps = np.array([scores], dtype=float), np.array([theirs]) - np.array([ours])
    return eval_report.length_controlled(scores, gaps)[0]["length_controlled"]


def test_length_controlled_by_hand():
    """With two gaps, +g and -g, two weights fit any two mean scores p and q of theirs: w_0 is the
    mean of the logits of p and q, whatever g is and however many prompts have it."""
    # p = 2/3 and q = 1/3: logits log 2 and -log 2.
    rate = controlled([1, 1, 0, 0, 0, 1], [9, 9, 9, 1, 1, 1], [1, 1, 1, 9, 9, 9])
    assert rate == pytest.approx(50, abs=0.01)
    # p = 3/4 where longer, q = 1/2 where shorter: w_0 is log(3) / 2, the raw rate 5/8.
    scores, ours, theirs = [1, 1, 1, 0, 1, 1, 0, 0], [9] * 4 + [1] * 4, [1] * 4 + [9] * 4
    assert controlled(scores, ours, theirs) == pytest.approx(100 / (1 + 3**-0.5), abs=0.05)
    # Twice as many longer ones: the raw rate is 2/3, the other one stays.
    scores, ours, theirs = scores[:4] * 2 + scores[4:], [9] * 8 + [1] * 4, [1] * 8 + [9] * 4
    assert controlled(scores, ours, theirs) == pytest.approx(100 / (1 + 3**-0.5), abs=0.05)
    assert controlled([1, 0.5, 1], [5, 5, 5], [5, 5, 5]) == pytest.approx(100 * 2.5 / 3, abs=0.1)
    assert 99.9 < controlled([1] * 50, [5, 6] * 25, [5] * 50) <= 100


def test_length_controlled_recovers_the_weights_that_made_the_scores():
    generator = np.random.default_rng(0)
    ours, theirs = generator.integers(1, 2000, (2, 400))
    t = np.tanh((theirs - ours) / (theirs - ours).std(ddof=1))
    scores = 1 / (1 + np.exp(-(-1.3 * t + 0.4)))
    rate = controlled(scores, ours, theirs)
    assert rate == pytest.approx(100 / (1 + math.exp(-0.4)), abs=0.01)
    assert controlled(1 - scores, theirs, ours) == pytest.approx(100 - rate, abs=1e-6)


def test_one_weight_of_length_is_shared_by_all_cells():
    """A judge that likes length, w = -2, and nothing else sees three models. One is the longer in
    97 prompts of 100 and wins most: by itself, its rate at equal lengths is anyone's guess."""
    generator = np.random.default_rng(0)
    signs = np.where(generator.random((3, 2000)) < [[0.5], [0.5], [0.97]], -1, 1)
    gaps = signs * generator.integers(100, 900, (3, 2000))
    x = np.tanh(gaps / gaps.std(axis=1, ddof=1, keepdims=True))
    scores = (generator.random((3, 2000)) < 1 / (1 + np.exp(2 * x))).astype(float)
    assert scores[2].mean() > 0.8
    *_, shared = eval_report.length_controlled(scores, gaps)
    (alone,) = eval_report.length_controlled(scores[2:], gaps[2:])
    assert shared["lc_low"] < 50 < shared["lc_high"]
    assert shared["length_controlled"] == pytest.approx(50, abs=5)
    widths = [cell["lc_high"] - cell["lc_low"] for cell in (shared, alone)]
    assert widths[0] < widths[1] / 2


def test_without_gaps_the_length_controlled_interval_is_the_other_one():
    for scores in ([1.0] * 50, [1.0] * 7 + [0.5] * 6 + [0.0] * 2 + [0.25]):
        (cell,) = eval_report.length_controlled(np.array([scores]), np.zeros((1, len(scores))))
        ends = eval_report.interval(np.array(scores))
        assert [cell["lc_low"], cell["lc_high"]] == pytest.approx(ends, abs=0.01)


def compared(found, ours, theirs):
    """The figures of one pair. ours, theirs: lengths in characters."""
    lengths = {"row": np.array(ours), "column": np.array(theirs)}
    return eval_report.compare({("row", "column"): found}, lengths)["row", "column"]


def test_a_cell_by_hand():
    """Six prompts: won twice, won and tied, the first wins twice, identical, one missing, lost."""
    found = [["a", "b"], ["a", "tie"], ["a", "a"], [], ["a", None], ["b", "a"]]
    ours, theirs = [9, 8, 7, 6, 5, 4], [3, 9, 4, 6, 1, 5]
    cell = compared(found, ours, theirs)
    assert cell["n"] == 5
    assert cell["win_rate"] == pytest.approx(100 * (1 + 0.75 + 0.5 + 0.5 + 0) / 5)
    assert (cell["missing"], cell["identical"]) == (1, 1)
    assert cell["ties_percent"] == pytest.approx(100 / 9)
    assert cell["flips_percent"] == pytest.approx(50)
    assert cell["first_percent"] == pytest.approx(100 * 6 / 8)
    other = compared([both[::-1] for both in found], theirs, ours)  # seen from the column
    mirrored = eval_report.mirrored(cell)
    assert mirrored.pop("verdicts") == other.pop("verdicts") and mirrored.keys() == other.keys()
    for name, value in other.items():
        assert mirrored[name] == pytest.approx(value, abs=1e-6), name


def test_intervals_by_hand():
    """70 of 100 won: with two wins and two losses more 72 of 104, a variance of 72 * 32 / 104^2.
    50 of 50 won: 52 of 54, whose upper end is cut at 100."""
    error = 1.96 * math.sqrt(72 * 32 / 104**3)
    ends = [100 * (72 / 104 - error), 100 * (72 / 104 + error)]
    assert eval_report.interval(np.array([1.0] * 70 + [0.0] * 30)) == pytest.approx(ends)
    low = 100 * (52 / 54 - 1.96 * math.sqrt(52 * 2 / 54**3))
    assert eval_report.interval(np.ones(50)) == pytest.approx([low, 100])


@pytest.mark.parametrize("n", [50, 200])
@pytest.mark.parametrize("rate", [0.5, 0.8, 0.97, 0.99, 0.01])
@pytest.mark.parametrize("ties", [0, 0.3])
def test_intervals_hold_the_true_rate(n, rate, ties):
    """In 93 % of samples and more, exactly: over all numbers of wins and ties that there are. ties:
    as a share of the most that the rate allows."""
    tie = ties * 2 * min(rate, 1 - rate)
    logs = [math.log(x) if x else -math.inf for x in (rate - tie / 2, tie, 1 - rate - tie / 2)]
    covered = total = 0.0
    for tied in range(n + 1 if ties else 1):
        for won in range(n + 1 - tied):
            counts = won, tied, n - won - tied
            log = math.lgamma(n + 1) - sum(math.lgamma(count + 1) for count in counts)
            chance = math.exp(log + sum(c * x for c, x in zip(counts, logs, strict=True) if c))
            total += chance
            if chance > 1e-7:
                low, high = eval_report.interval(np.repeat([1, 0.5, 0], counts))
                covered += chance * (low <= 100 * rate <= high)
    assert total == pytest.approx(1) and 0.93 <= covered
    assert covered < 0.99  # nor are they much too wide


def test_two_rates_that_add_up_to_100_do_so_as_printed():
    """All rates of 500 prompts: among them 27.15, half of a tenth, which no float is exactly."""
    assert eval_report.tenths(27.25) == "27.2" and eval_report.tenths(72.75) == "72.8"
    for quarters in range(2001):
        scores = np.zeros(500)
        scores[: quarters // 4] = 1
        scores[quarters // 4 : quarters // 4 + 1] = quarters % 4 / 4
        shown = [eval_report.tenths(100 * x.mean()) for x in (scores, 1 - scores)]
        assert sum(int(text.replace(".", "")) for text in shown) == 1000, shown
        assert abs(float(shown[0]) - quarters / 20) < 0.05 + 1e-9


def test_doubtful_rates_are_marked():
    even, won = [["a", "b"], ["b", "a"]] * 10, [["a", "b"]] * 16 + [["b", "a"]] * 4
    varied, longer = [10, 90] * 10, [110, 170] * 10
    assert not compared(even, varied, [50] * 20)["lc_doubtful"]
    assert compared(won, varied, [50] * 20)["lc_doubtful"]  # 80 %
    cell = compared(even, longer, [50] * 20)  # longer by 60 and 120, sd 31
    assert cell["lc_doubtful"] and eval_report.shown(cell)["length_controlled"].endswith("?")


def test_stars_of_length_controlled_rates_are_their_own():
    """All wins are of the longer responses: 50 % where the lengths are equal, and 75 % as it is."""
    found = [["a", "b"]] * 60 + [["b", "a"]] * 20
    cell = compared(found, [90] * 60 + [10] * 20, [50] * 80)
    assert cell["significant"] and not cell["lc_significant"]
    shown = eval_report.shown(cell)
    assert shown["win_rate"].endswith("]*") and shown["length_controlled"].endswith("]")


def test_what_responses_are_like():
    row = dict(tokens=4, entropy=2.0, cut=False)
    short = dict(response=" ", tokens=1, entropy=2.0, cut=True)
    found = eval_report.describe([row | {"response": "a b a b"}, short])
    assert found["tokens"] == 2.5 and found["characters"] == 4 and found["entropy"] == 4 / 5
    assert found["cut_percent"] == found["empty_percent"] == 50
    assert found["distinct_1"] == 2 / 4 and found["distinct_2"] == 2 / 3  # ab ba ab


MARKUP = """<script>document.title = "broken"</script></script>
<img src=x onerror="document.title='broken'">
<!-- <style>* { display: none }</style> {{data}} {{script}} \u2028 &lt;b&gt; output [[A]]"""
PROBE = """
  const set = (id, value) => { at(id).value = value; at(id).oninput(); };
  const { title, scripts, images } = document, counts = {};
  Object.assign(out, { title, counts, scripts: scripts.length, images: images.length });
  out.cells = texts("#matrix button");
  for (const outcome of ["all", "row", "column", "even", "flip", "identical", "missing"]) {
    set("outcome", outcome);
    counts[outcome] = [texts("#count")[0], texts("article").length];
  }
  set("outcome", "all");
  set("row", "two");
  set("column", "one");
  set("search", "IMG SRC");
  out.searched = texts("article .text");
  out.badges = texts(".badge");
  set("kind", "length_controlled");
  out.controlled = texts("#matrix button");"""
USE = """
  out.names = [texts("#matrix th"), texts("#row option")];
  const [button] = all("#matrix button"), first = () => all("article")[0];
  button.focus();
  button.click();
  const top = first().getBoundingClientRect().top, bar = at("filters").getBoundingClientRect();
  out.chosen = { hidden: top < bar.bottom, stuck: bar.top === 0, focus: document.activeElement.id };
  out.kept = button.isConnected;
  const [before, count] = [first(), texts("article").length];
  at("more").click();
  out.more = [count, texts("article").length, before === first()];
  const plain = () => all("#matrix button").map(x => x.className.includes("plain"));
  out.plain = [plain()];
  at("kind").value = "length_controlled";
  at("kind").oninput();
  out.plain.push(plain());
  // As if the page were printed, and then as in the dark: the rules alone, without their condition.
  const [sheet] = document.styleSheets, rules = [...sheet.cssRules], style = getComputedStyle;
  const apply = medium => rules.filter(x => x.conditionText?.includes(medium)).forEach(
    x => [...x.cssRules].forEach(rule => sheet.insertRule(rule.cssText, sheet.cssRules.length)));
  const colors = () => [style(document.body).color, style(document.body).backgroundColor];
  out.light = colors();
  apply("dark");
  out.dark = colors();
  apply("print");
  const { maxHeight, overflow } = style(all(".text")[0]);
  out.printed = { maxHeight, overflow, filters: style(at("filters")).display };
  out.printed.colors = style(all("#matrix button")[0]).printColorAdjust;"""


def page_of_known_verdicts(tmp_path):
    """Six prompts: won, with markup in it, lost, tied, orders that disagree, identical, missing."""
    (tmp_path / "rule.py").write_text("def judge(prompt, a, b): ...")
    names = ["one=models/one", "two=models/two"]
    args = eval_judge.Args(models=names, judge=f"{tmp_path}/rule.py", output_dir=str(tmp_path))
    texts = [MARKUP, *(f"prompt {place}" for place in range(1, 6))]
    prompts = [[tiny.turn("user", text)] for text in texts]
    line, responses = dict(tokens=3, cut=False, entropy=1.0), {}
    for name in ("one", "two"):
        responses[name] = [line | {"response": f"{name} {place}"} for place in range(6)]
    responses["one"][0]["response"] = MARKUP
    responses["one"][4] = responses["two"][4]
    judge = eval_judge.RuleJudge(args)
    cells, asks = eval_judge.list_asks(judge, prompts, responses, [("one", "two")])
    given = [("a", "b"), ("b", "a"), ("tie", "tie"), ("a", "a"), (), ("a", None)]
    verdicts = {}
    for keys, both in zip(cells["one", "two"], given, strict=True):
        pairs = zip(keys, both, strict=True)
        verdicts |= {key: {"verdict": verdict} for key, verdict in pairs if verdict}
    questions = [dict(uid=text, category=None, prompt=text) for text in texts]
    report = eval_report.make_report(judge, cells, verdicts, responses, questions, args)
    eval_report.write_report(report, questions, responses, args)
    return report, tmp_path / "report.html"


def test_the_page_holds_texts_as_data_alone(tmp_path):
    _, path = page_of_known_verdicts(tmp_path)
    page = path.read_text()
    data = page.partition('id="data">')[2].partition("</script>")[0]
    assert "<" not in data and json.loads(data)["responses"]["one"][0] == MARKUP
    assert page.count("<script") == 2 and "{{data}}" not in page.replace(data, "")
    assert "http://" not in page and "https://" not in page.replace("'sha256", "")
    policy = r"default-src 'none'.*style-src 'sha256-[^']{44}'; script-src 'sha256-[^']{44}'"
    assert re.search(policy, page)


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
def test_the_page_in_a_browser(tmp_path):
    """As written, the page shows articles, so its policy lets its own script run. With a probe let
    in, its filters do what they say, and the markup in the responses is text."""
    report, path = page_of_known_verdicts(tmp_path)
    as_written = in_browser(path, tmp_path)
    assert "<article>" in as_written and "broken</title>" not in as_written
    out = probe(path, PROBE, tmp_path)
    assert (out["title"], out["scripts"], out["images"]) == ("Win rates", 3, 0)
    assert out["counts"] == {
        "all": ["6 of 6 prompts", 6],
        "row": ["1 of 6 prompts", 1],
        "column": ["1 of 6 prompts", 1],
        "even": ["2 of 6 prompts", 2],
        "flip": ["1 of 6 prompts", 1],
        "identical": ["1 of 6 prompts", 1],
        "missing": ["1 of 6 prompts", 1],
    }
    assert out["searched"] == [MARKUP, "two 0", MARKUP]
    assert out["badges"] == ["two first: one wins", "one first: one wins"]
    cell, other = report["matrix"]["one"]["two"], report["matrix"]["two"]["one"]
    rates = [f"{x['win_rate']:.1f}" for x in (cell, other)]
    assert [text.split(" ")[0] for text in out["cells"]] == rates
    assert out["controlled"][0].startswith(f"{cell['length_controlled']:.1f}")


def probe(path, script, tmp_path):
    """What a script that is let into the page puts into `out`."""
    helpers = """const at = id => document.getElementById(id);
  const out = {}, all = selector => [...document.querySelectorAll(selector)];
  const texts = selector => all(selector).map(x => x.textContent);"""
    ending = """const result = document.createElement("pre");
  result.id = "result";
  result.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(out))));
  document.body.append(result);"""
    script = f'window.addEventListener("load", () => {{{helpers}{script}{ending}}});'
    probed, page = tmp_path / "probed.html", path.read_text()
    policy = re.search("<meta http-equiv.*?>", page, re.DOTALL)[0]
    page = page.replace(policy, "").replace("</body>", f"<script>{script}</script></body>")
    probed.write_text(page)
    found = re.search('<pre id="result">([^<]*)</pre>', in_browser(probed, tmp_path))[1]
    return json.loads(base64.b64decode(found).decode())


def in_browser(path, tmp_path):
    """The page's document after its scripts have run."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --dump-dom"
    flags += " --virtual-time-budget=5000"
    profile = f"--user-data-dir={tmp_path}/profile-{path.stem}"
    command = [CHROMIUM, *flags.split(), profile, f"file://{path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout


def small_report(tmp_path, names, pairs, found, categories, verdicts=None, texts=None, **others):
    """The report of `found`, {pair: verdicts of each prompt}, and its page's data."""
    models = [f"{name}=models/{name}" for name in ("x", "y")]
    args = eval_judge.Args(models=models, output_dir=str(tmp_path), **others)
    line = dict(tokens=3, cut=False, entropy=1.5)
    texts = texts or {name: [f"{name} {i}" for i in range(len(categories))] for name in names}
    responses = {name: [line | {"response": text} for text in texts[name]] for name in names}
    cells, kept = {pair: [] for pair in pairs}, {}
    for pair, prompts in found.items():
        for i, both in enumerate(prompts):
            keys = [f"{pair} {i} {order}" for order in range(len(both))]
            cells[pair].append(keys)
            kept |= {key: {"verdict": x} for key, x in zip(keys, both, strict=True)}
    questions = [dict(uid=i, category=x, prompt=f"p {i}") for i, x in enumerate(categories)]
    judge = type("Judge", (), {"faults": []})
    kept = {key: line | (verdicts or {}).get(key, {}) for key, line in kept.items()}
    report = eval_report.make_report(judge, cells, kept, responses, questions, args)
    eval_report.write_report(report, questions, responses, args)
    page = (tmp_path / "report.html").read_text()
    return report, json.loads(page.partition('id="data">')[2].partition("</script>")[0])


WON, LOST, TIED = ("a", "b"), ("b", "a"), ("tie", "tie")


def test_each_category_has_a_matrix(tmp_path):
    """Won 3 of 4 in code, 1 of 4 in verse; one prompt alone, and those without, are in no other."""
    found = {("x", "y"): [WON, WON, WON, LOST, WON, LOST, LOST, LOST, WON, WON]}
    kinds = ["code"] * 4 + ["verse"] * 4 + ["maths", None]
    report, page = small_report(tmp_path, "xy", [("x", "y")], found, kinds)
    rates = {kind: x["x"]["y"]["win_rate"] for kind, x in report["categories"].items()}
    assert rates == dict(code=75, verse=25) and report["matrix"]["x"]["y"]["win_rate"] == 60
    assert report["categories"]["code"]["y"]["x"]["win_rate"] == 25
    assert page["categories"] == report["categories"]
    printed = eval_report.markdown(report)
    assert f"| x | – | {report['categories']['verse']['x']['y']['shown']['win_rate']} |" in printed


def test_stars_of_categories_are_corrected_for_their_number(tmp_path):
    """6 of 6 won: p is 2 / 2^6 = 0.031 in each of two categories, and 2 / 2^12 over both. A name
    of theirs that a terminal would obey is printed without what it obeys."""
    found = {("x", "y"): [WON] * 12}
    kinds = ["code"] * 6 + ["\x1b]0;verse"] * 6
    report, _ = small_report(tmp_path, "xy", [("x", "y")], found, kinds)
    assert report["matrix"]["x"]["y"]["significant"]
    cells = [x["x"]["y"] for x in report["categories"].values()]
    assert [cell["p"] for cell in cells] == [pytest.approx(2 / 64)] * 2
    assert not any(cell["significant"] for cell in cells)
    printed = eval_report.markdown(report)
    assert "category code" in printed and "verse" in printed and "\x1b" not in printed


def test_tokens_and_cost_are_the_servers(tmp_path):
    """1,000 tokens read at 2 a million and 40 written at 10 a million: 0.0024. What a server gives
    in another form is not counted."""
    found, prices = {("x", "y"): [WON, LOST]}, dict(price_in=2.0, price_out=10.0)
    verdicts = {
        "('x', 'y') 0 0": {"usage": {"prompt_tokens": 600, "completion_tokens": 30}},
        "('x', 'y') 0 1": {"usage": {"prompt_tokens": 400, "completion_tokens": 10}},
        "('x', 'y') 1 0": {"usage": {"prompt_tokens": "7", "completion_tokens": None}},
        "('x', 'y') 1 1": {"usage": [5]},
    }
    report, _ = small_report(tmp_path, "xy", found, found, [None] * 2, verdicts, **prices)
    judge = report["judge"]
    assert (judge["tokens_read"], judge["tokens_written"]) == (1000, 40)
    assert judge["cost"] == pytest.approx(0.0024)
    report, _ = small_report(tmp_path, "xy", found, found, [None] * 2)
    assert not report["judge"].keys() & {"tokens_read", "tokens_written", "cost"}


def test_the_curves_of_runs_over_their_steps(tmp_path):
    names = ["r@20", "r@100", "s@20", "start"]
    found = {("r@20", "start"): [WON, LOST], ("r@100", "start"): [WON, WON]}
    found |= {("r@20", "s@20"): [WON, WON], ("s@20", "start"): [TIED, LOST]}
    _, page = small_report(tmp_path, names, found, found, [None] * 2)
    rates = {run: [(x["step"], x["win_rate"]) for x in xs] for run, xs in page["curves"].items()}
    assert rates == {"r": [(20, 75), (100, 100)], "s": [(20, 12.5)]}
    assert page["curves"]["s"][0] | {} == dict(step=20, win_rate=12.5, entropy=0.5, tokens=3)
    assert list(page["groups"].items()) == [
        ("step 20", ["r@20", "s@20", "start"]),
        ("step 100", ["r@100", "start"]),
    ]


def test_the_page_shows_what_is_printed(tmp_path):
    """One formatter makes the figures of both."""
    found = {("x", "y"): [WON] * 5 + [LOST] * 2 + [TIED] * 4}
    report, page = small_report(tmp_path, "xy", found, found, [None] * 11)
    printed = eval_report.markdown(report)
    for rows in page["tables"].values():
        assert all(f"| {' | '.join(row)} |" in printed for row in rows)
    cells = [page["matrix"][row][column]["shown"]["win_rate"] for row, column in ("xy", "yx")]
    assert f"| x | – | {cells[0]} |" in printed and f"| y | {cells[1]} | – |" in printed
    assert [cell.split(" ± ")[0] for cell in cells] == ["63.6", "36.4"]
    assert "not corrected for many" in printed
    assert (
        "which is not corrected for the number of pairs" in (tmp_path / "report.html").read_text()
    )


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
def test_the_page_in_use(tmp_path):
    """Names that are numbers keep their order. A chosen cell shows its first prompt below the bar,
    and the focus goes there. More prompts are appended to those that are there. What is bold is
    significant by the rate shown: here all wins are the longer responses'. Dark, it is dark; the
    printed page has whole answers and colours."""
    found = {("10", "9"): [WON] * 60 + [LOST] * 20}
    texts = {"10": ["x" * 90] * 60 + ["x" * 10] * 20, "9": ["y" * 50] * 80}
    small_report(tmp_path, ["10", "9"], found, found, [None] * 80, texts=texts)
    out = probe(tmp_path / "report.html", USE, tmp_path)
    assert out["names"] == [["", "10", "9"], ["10", "9"]]
    assert out["chosen"] == {"hidden": False, "stuck": True, "focus": "list"} and out["kept"]
    assert out["more"] == [20, 40, True]
    assert out["plain"] == [[False, False], [True, True]]
    expected = dict(maxHeight="none", overflow="visible", filters="none", colors="exact")
    assert out["printed"] == expected
    for name, dark in (("light", False), ("dark", True)):
        ink, page = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in out[name])
        assert (ink > page + 300) == dark and (page > ink + 300) == (not dark)


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
def test_the_page_against_a_baseline(tmp_path):
    """Two columns, three curves, and a stripe for each of 3 prompts, the most won first."""
    found = {("r@1", "old"): [LOST, TIED, WON], ("r@2", "old"): [LOST, WON, ("a", None)]}
    names = ["old", "r@1", "r@2"]
    small_report(tmp_path, names, found, found, [None] * 3, baseline="old")
    script = """
  out.header = texts("#matrix th");
  out.rows = texts("#matrix td:first-child");
  out.curves = all("#curves svg").map(x => x.querySelectorAll("circle").length);
  out.heat = all("#heat svg").map(svg => [...svg.children].map(
    x => [x.getAttribute("d"), x.getAttribute("class"), x.style.getPropertyValue("--far")]));"""
    out = probe(tmp_path / "report.html", script, tmp_path)
    assert out["header"] == ["", "win rate", "length-controlled"]
    assert out["rows"] == ["r@1", "r@2"] and out["curves"] == [2, 2, 2]
    square = "M{} 0h1v1h-1z".format  # the prompts' order is 1, 2, 0: 1.5, 1.5 and 0 wins
    first, second = ({d: (kind, far) for d, kind, far in row} for row in out["heat"])
    won, lost = ("won", "100%"), ("lost", "100%")
    assert first == {square(0): ("lost", "0%"), square(1): won, square(2): lost}
    assert second == {square(0): won, square(1): ("missing", ""), square(2): lost}
