"""The recipes against the papers: the tables here were typed from the papers, not from the recipes.
Each section is read by its own script's parser."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

import common

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml")) if path.stem != "toy"
}
RECIPES = {stem: yaml.safe_load(path.read_text()) for stem, path in FILES.items()}
SECTIONS = {
    stem: [key for key, value in recipe.items() if isinstance(value, dict)]
    for stem, recipe in RECIPES.items()
}
SETTING = re.compile(r"^ *(\w+): ([^#]+?)(?:  # (.+))?$")
# A source is a paper with its arXiv or OpenReview id and the place, or "ours:" with the reason.
PAPERS = r"(SPO 1NIyjrtxJU|StaPO ke1f4IVR47|AlphaPO 2501\.03884v4)"
SOURCE = re.compile(PAPERS + r", (Section \d|Table \d|Eq\. \d|A\.\d)|ours: .{10}")

# AlphaPO, Table 3: alpha, beta, gamma/beta, learning rate. Models: Table 4, rankers: Section 4.1.
ALPHAPO = """
    DPO      mistral-instruct        -     0.01  -     5e-7
    DPO      llama3-instruct         -     0.01  -     7e-7
    DPO      llama3-instruct-armorm  -     0.01  -     3e-7
    DPO      gemma2-instruct         -     0.01  -     5e-7
    SimPO    mistral-instruct        -     2.5   0.1   5e-7
    SimPO    llama3-instruct         -     2.5   0.55  1e-6
    SimPO    llama3-instruct-armorm  -     10.0  0.3   1e-6
    SimPO    gemma2-instruct         -     10    0.5   8e-7
    AlphaPO  mistral-instruct        0.25  2.5   0.1   7e-7
    AlphaPO  llama3-instruct         0.25  2.5   1.0   1e-6
    AlphaPO  llama3-instruct-armorm  0.25  10.0  0.3   1.1e-6
    AlphaPO  gemma2-instruct         0.1   10    0.5   8e-7
"""
MISTRAL, LLAMA = "mistralai/Mistral-7B-Instruct-v0.2", "meta-llama/Meta-Llama-3-8B-Instruct"
ALPHAPO_MODELS = {
    "mistral-instruct": (MISTRAL, "princeton-nlp/mistral-instruct-ultrafeedback"),
    "llama3-instruct": (LLAMA, "princeton-nlp/llama3-ultrafeedback"),
    "llama3-instruct-armorm": (LLAMA, "princeton-nlp/llama3-ultrafeedback-armorm"),
    "gemma2-instruct": ("google/gemma-2-9b-it", "princeton-nlp/gemma2-ultrafeedback-armorm"),
}
# Where StaPO states nothing, the numbers of SimPO's README: beta, gamma/beta and learning rate of
# SimPO, beta and learning rate of DPO. Then the start model; for the Base ones it is an SFT run.
STAPO = {
    "mistral-base": ((2.0, 0.8, 3e-7), (0.01, 5e-7), None),
    "mistral-instruct": ((2.5, 0.1, 5e-7), (0.01, 5e-7), MISTRAL),
    "llama3-base": ((2.0, 0.5, 6e-7), (0.01, 5e-7), None),
    "llama3-instruct": ((2.5, 0.55, 1e-6), (0.01, 7e-7), LLAMA),
}
SPLITS = {  # the names of the splits on the hub
    "HuggingFaceH4/ultrachat_200k": ("train_sft", "test_sft"),
    "HuggingFaceH4/ultrafeedback_binarized": ("train_prefs", "test_prefs"),
    "princeton-nlp/mistral-instruct-ultrafeedback": ("train", "test"),
    "princeton-nlp/llama3-ultrafeedback": ("train", "test"),
    "princeton-nlp/llama3-ultrafeedback-armorm": ("train", "test"),
    "princeton-nlp/gemma2-ultrafeedback-armorm": ("train", "test"),
}


@pytest.fixture
def parse(monkeypatch):
    """A recipe's section as its script reads it: parse(stem, script, more arguments...)."""

    def parse(stem, script, *arguments):
        monkeypatch.chdir(ROOT)
        arguments = ["--config", f"recipes/{stem}.yaml", *arguments]
        monkeypatch.setattr("sys.argv", [f"{script}.py", *arguments])
        return common.parse_args(importlib.import_module(script).Args)

    return parse


def commands(stem):
    """The commands at the head of a recipe, as lists of words."""
    head = FILES[stem].read_text().partition("\n\n")[0].replace("\\\n#", "")
    return [shlex.split(line.removeprefix("#")) for line in re.findall(r"^#     .+", head, re.M)]


def has(args, **expected):
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("stem", "script"), [(stem, name) for stem in FILES for name in SECTIONS[stem]]
)
def test_a_section_is_read_by_its_script(parse, stem, script):
    args = parse(stem, script)
    assert SPLITS[args.dataset] == (args.train_split, args.eval_split)
    shared = RECIPES[stem].keys() - set(SECTIONS[stem])
    assert all(hasattr(args, key) for key in shared)


@pytest.mark.parametrize("row", ALPHAPO.strip().splitlines())
def test_alphapo_table_3(parse, row):
    method, key, alpha, beta, ratio, learning_rate = row.split()
    script = "dpo" if method == "DPO" else "alphapo"
    args = parse(f"alphapo-{key}-{method.lower()}", script)
    model, dataset = ALPHAPO_MODELS[key]
    has(args, model=model, dataset=dataset, beta=float(beta), learning_rate=float(learning_rate))
    has(args, batch_size=128, max_length=2048, warmup_ratio=0.1)  # A.6, as the next line
    has(args, num_train_epochs=1, max_steps=0)
    if method == "DPO":
        has(args, label_smoothing=0.0)
    else:  # SimPO is the limit of alpha 0
        has(args, alpha=0.0 if alpha == "-" else float(alpha), gamma_beta_ratio=float(ratio))
        has(args, use_reference=False)


@pytest.mark.parametrize("key", STAPO)
def test_stapo(parse, key):
    (beta, ratio, learning_rate), (dpo_beta, dpo_learning_rate), model = STAPO[key]
    stem = f"stapo-{key}"
    model = model or parse(stem, "sft").output_dir
    for script in ("stapo", "dpo", "alphapo"):
        has(parse(stem, script), model=model, num_train_epochs=5, batch_size=128, warmup_ratio=0.1)
    stapo = parse(stem, "stapo")
    has(stapo, contrast="simpo", margin_left=0.6, margin_right=0.8)
    simpo = parse(stem, "alphapo")
    has(simpo, alpha=0.0, gamma_beta_ratio=ratio, use_reference=False)
    for args in (stapo, simpo):
        has(args, beta=beta, learning_rate=learning_rate)
    has(parse(stem, "dpo"), beta=dpo_beta, learning_rate=dpo_learning_rate, label_smoothing=0.0)
    if "base" in key:
        sft = parse(stem, "sft")
        has(sft, dataset="HuggingFaceH4/ultrachat_200k", num_train_epochs=1, learning_rate=2e-5)
        has(stapo, dataset="HuggingFaceH4/ultrafeedback_binarized")
    else:  # with the Z of DPO, the margins are the same in units of reward, beta times nats
        other = parse(f"{stem}-dpo-contrast", "stapo")
        has(other, contrast="dpo", model=model, learning_rate=dpo_learning_rate)
        shared = "dataset num_train_epochs batch_size max_length warmup_ratio export_every".split()
        has(other, **{name: getattr(stapo, name) for name in shared})
        assert other.beta * other.margin_left == pytest.approx(beta * 0.6)
        assert other.beta * other.margin_right == pytest.approx(beta * 0.8)


@pytest.mark.parametrize(
    ("stem", "model"),
    [
        ("spo-qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("spo-llama3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    ],
)
def test_spo(parse, stem, model):
    scripts = "sft", "spo", "dpo", "ipo", "kto"
    sft, spo, dpo, ipo, kto = (parse(stem, script) for script in scripts)
    has(sft, model=model, dataset="HuggingFaceH4/ultrachat_200k", learning_rate=2e-5)
    for args in (spo, dpo, ipo, kto):  # "start from the same SFT checkpoint" (Section 5.1)
        has(args, model=sft.output_dir, dataset="HuggingFaceH4/ultrafeedback_binarized")
        has(args, learning_rate=5e-7, num_train_epochs=1, max_length=2048, warmup_ratio=0.1)
    has(dpo, label_smoothing=0.1, beta=spo.beta)  # Section 5.1; beta is not given
    has(kto, beta=spo.beta)
    assert 1 / (2 * ipo.beta) == 1 / spo.beta  # "optimal solutions coincide" (Section 5.1)
    assert not ipo.length_normalize
    assert 0 < spo.beta <= spo.alpha  # else the minimum makes the chosen answer less likely
    assert kto.batch_size == 2 * spo.batch_size and kto.desirable_weight == kto.undesirable_weight


@pytest.mark.parametrize("stem", FILES)
def test_every_number_has_its_source(stem):
    seen = 0
    for line in FILES[stem].read_text().splitlines():
        if setting := SETTING.match(line):
            key, value, comment = setting.groups()
            seen += 1
            number = value[0] in "-.0123456789"
            text = isinstance(yaml.safe_load(value), str)
            assert not (number and text), f"{line}: 5e-7 is text to YAML"
            if number or key in ("model", "dataset"):
                assert SOURCE.match(comment or ""), line
    recipe = RECIPES[stem]  # a key that stands twice would be lost in it
    assert seen == sum(len(recipe[name]) for name in SECTIONS[stem]) + len(recipe) - len(
        SECTIONS[stem]
    )


@pytest.mark.parametrize("stem", FILES)
def test_the_commands_of_a_recipe_run_line_by_line(parse, stem):
    there, ran = set(), []
    for words in commands(stem):
        if words[0] == "hf":
            there.add(words[words.index("--local-dir") + 1])
            continue
        assert words[:3] == ["torchrun", "--nproc_per_node", "8"]
        assert words[4:6] == ["--config", f"recipes/{stem}.yaml"]
        script = words[3].removesuffix(".py")
        args = parse(stem, script, *words[6:])
        assert args.model in there or not args.model.startswith("runs/")
        assert args.output_dir not in there
        there.add(args.output_dir)
        ran.append(script)
    assert set(ran) == set(SECTIONS[stem])


def test_no_two_recipes_write_to_one_folder():
    folders = [RECIPES[stem][name]["output_dir"] for stem in FILES for name in SECTIONS[stem]]
    assert len(folders) == len(set(folders))


def test_the_table_lists_every_recipe_and_what_is_ours():
    row = r"^\| \[(?!toy)(.+)\.yaml\]\(\1\.yaml\) \|(.+)\|$"
    rows = re.findall(row, (ROOT / "recipes/README.md").read_text(), re.M)
    assert [stem for stem, _ in rows] == list(FILES)
    for stem, rest in rows:
        settings = filter(None, map(SETTING.match, FILES[stem].read_text().splitlines()))
        ours = {
            key for key, _, comment in map(re.Match.groups, settings) if "ours:" in (comment or "")
        }
        *_, scripts, keys = rest.split("|")
        assert scripts.replace(",", "").split() == SECTIONS[stem]
        assert set(re.findall(r"\w+", keys)) == ours, stem
