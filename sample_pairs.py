"""On-policy preference pairs: a model answers each prompt several times, a reward scores the
answers, and the best against the worst is a pair, in files that every training script reads.

    y_1 ... y_n ~ pi(. | x) at the temperature      AlphaPO, Section 4.1: n = 5 at 0.8
    chosen   = the y_i of the highest score         of equal ones the first
    rejected = the y_i of the lowest score          likewise
    margin   = the difference of the two scores     above 0, and at least min_margin

So does AlphaPO (https://arxiv.org/abs/2501.03884v4, Section 4.1), after SimPO
(https://arxiv.org/abs/2405.14734v3), with the rewards PairRM and ArmoRM. StaPO
(https://openreview.net/forum?id=ke1f4IVR47, Section 4) has "multiple responses", and PairRM.

--reward is one of

    a sequence classifier of transformers with one output: it gets the chat in its own template;
    a Python file with a function score(prompt, response) -> number, prompt a message list;
    "judge", the one that --judge names, as in eval_judge.py: it compares each two answers in both
    orders, a win counts 1 and a tie 1/2, and an answer's score is its mean.

Blank answers and repetitions are left out first. Answers, scores and verdicts are kept in
output_dir as they come: the same command goes on where it was stopped, and one with more samples,
prompts or another reward asks only for what is new.

Departures from the papers: another reward, as ArmoRM and PairRM need code of their own, which is
never run. Prompts whose answers score alike are dropped, of which the papers say nothing. SimPO's
own code also cuts the sampling at top_p 0.95, which the papers do not mention; here it is whole.

    python sample_pairs.py --config recipes/toy.yaml
    python spo.py --config recipes/toy.yaml --dataset runs/toy/sample_pairs --output_dir runs/own
    torchrun --nproc_per_node 8 sample_pairs.py --reward Skywork/Skywork-Reward-V2-Llama-3.1-8B
"""

import dataclasses
import datetime
import importlib.util
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.hf_argparser import HfArg

import chat
import common
import data
import dataset_files
import eval_files
import eval_judge
import files
import model_files
from eval_files import digest, rank


@dataclass
class Args:
    reward: str = HfArg(default="", help="reward model (hub name, folder), FILE.py, or: judge")
    num_samples: int = HfArg(default=5, help="answers to each prompt")
    temperature: float = HfArg(default=0.8, help="of the answers")
    min_margin: float = HfArg(default=0.0, help="of a pair's scores; pairs below are dropped")

    model: str = HfArg(default="Qwen/Qwen2.5-7B-Instruct", help="hub name or folder")
    dataset: str = HfArg(default="HuggingFaceH4/ultrafeedback_binarized", help="hub name or path")
    train_split: str = HfArg(default="train_prefs", help="split that has the prompts")
    eval_split: str = HfArg(default="test_prefs", help="that of held-out prompts; empty for none")
    apply_chat_template: bool = HfArg(default=False, help="wrap plain strings in the chat template")
    output_dir: str = HfArg(default=f"runs/{Path(__file__).stem}", help="--dataset of the training")
    num_prompts: int = HfArg(default=0, help="of each split, chosen by seed; 0 takes all")
    max_length: int = HfArg(default=2048, help="tokens, prompt and answer; drops longer prompts")
    max_new_tokens: int = HfArg(default=1024, help="tokens of an answer; longer ones are cut")
    generation_batch_size: int = HfArg(default=32, help="answers a process generates at once")
    seed: int = HfArg(default=42, help="order of the prompts, answers")

    judge: str = HfArg(default="gpt-4o", help="of --reward judge, as the rest: see eval_judge.py")
    base_url: str = HfArg(default="", help="the judge's OpenAI-compatible endpoint; empty: OpenAI")
    judge_prompt: str = HfArg(default="", help="a file with another wording of JUDGE_PROMPT")
    judge_temperature: float = HfArg(default=0.0, help="of verdicts; below 0: the endpoint's own")
    judge_max_tokens: int = HfArg(default=512, help="of a verdict's answer; doubled once if cut")
    concurrency: int = HfArg(default=16, help="requests to the endpoint at a time")
    timeout: float = HfArg(default=120.0, help="seconds that a request may take")
    price_in: float = HfArg(default=0.0, help="price of a million tokens that the judge reads")
    price_out: float = HfArg(default=0.0, help="price of a million tokens that the judge writes")
    yes: bool = HfArg(default=False, help="call the endpoint without asking, as batch jobs must")

    def __post_init__(self):
        least = dict(num_samples=2, min_margin=0, num_prompts=0, max_new_tokens=1, seed=0)
        least |= dict(generation_batch_size=1, judge_max_tokens=1, concurrency=1, timeout=1)
        least |= dict(price_in=0, price_out=0, max_length=self.max_new_tokens + 1)
        for name, value in least.items():
            if not getattr(self, name) >= value:
                raise ValueError(f"--{name} must be {value} or more")
        if not 0 < self.temperature < math.inf:
            raise ValueError("--temperature must be above 0: at 0 all answers are the same")
        if Path(self.dataset).resolve() == Path(self.output_dir).resolve():
            raise ValueError("--output_dir must be another folder than --dataset")


@dataclass
class Example:
    """A prompt with its answers."""

    split: str
    prompt: list  # of messages
    answers: list = ()  # lines as eval_judge.generate_all makes them: no two texts are the same
    scores: list = ()  # of the answers, larger is better; empty where a verdict is missing


def main(args):
    if not args.reward:
        common.fail("what scores the answers? --reward MODEL, --reward FILE.py or --reward judge")
    reward = open_reward(args)  # before all else, as it may be missing
    if "RANK" in os.environ:  # set by torchrun; processes wait as long as the slowest one takes
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    model = eval_judge.open_model(args.model, "--model")
    splits = [args.train_split]
    if args.eval_split and not dataset_files.one_split(args.dataset):
        splits.append(args.eval_split)
    prompts = {split: load_prompts(model, split, args) for split in splits}
    examples = [Example(split, prompt) for split in splits for prompt in prompts[split]]
    sample(model, examples, args)
    score = score_by_judge if args.reward == "judge" else score_each
    score(reward, examples, args)
    if rank() == 0:
        made_by = dict(settings=vars(args), model=model.fingerprint, reward=reward.id)
        report = dict(made_by)
        for split in splits:
            found = [example for example in examples if example.split == split]
            report[split] = write_pairs(split, found, made_by, args)
        path = Path(args.output_dir) / "report.json"
        path.write_text(json.dumps(report, indent=1, allow_nan=False))


# ---- Answers ----
def load_prompts(model, split, args):
    """The different prompts of a split, as message lists, in an order that the seed gives."""
    prompts, _ = eval_judge.load_prompts({"": model}, dataclasses.replace(args, eval_split=split))
    if any(prompt[0]["role"] == chat.TEXT for prompt in prompts):
        form = '[{"role": "user", "content": "..."}], which --apply_chat_template makes'
        common.fail(f"--dataset: {split} has plain text; it needs prompts of the form {form}")
    return prompts


def sample(model, examples, args):
    """Sets the examples' answers, without blank ones and repetitions."""
    settings = [args.seed, args.temperature, args.max_new_tokens, torch.cuda.is_available()]
    keys, ids_of = [], {}  # ids_of: {key: prompt ids}; random numbers come from the key
    for example in examples:
        ids = chat.to_ids(example.prompt, model.tokenizer, header=True)
        places = range(args.num_samples)
        own = [digest(model.fingerprint, ids, settings, place) for place in places]
        keys.append(own)
        ids_of |= dict.fromkeys(own, ids)
    lines = eval_judge.generate_missing("answers", model, ids_of, args)
    for example, own in zip(examples, keys, strict=True):
        by_text = {lines[key]["response"]: lines[key] for key in own}
        example.answers = [x for text, x in by_text.items() if not data.is_blank(text)]
    cut = sum(lines[key]["cut"] for key in ids_of)
    common.print0(f"{cut} of {len(ids_of)} answers are cut at {args.max_new_tokens} tokens")


# ---- Scores ----
NEEDED = (
    "a reward model has to be a sequence classifier that runs without code of its own: so are "
    "Skywork-Reward-V2, Skywork-Reward v0.2 and FsfairX-LLaMA3-RM-v0.1; ArmoRM and PairRM are not"
)


def open_reward(args):
    """The reward that `--reward` names. Its `id`, a hash, is part of its scores' keys."""
    if args.reward == "judge":
        return eval_judge.open_judge(args)
    return RuleReward(args) if args.reward.endswith(".py") else ClassifierReward(args)


class RuleReward:
    """A Python file with a function score(prompt, response)."""

    def __init__(self, args):
        with common.user_errors(f"--reward {args.reward} cannot be used"):
            self.id = digest(Path(args.reward).read_text())
            spec = importlib.util.spec_from_file_location("rule_reward", args.reward)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self.score = vars(module).get("score")
            if self.score is None:
                raise ValueError("it has no function score(prompt, response)")


class ClassifierReward:
    """A sequence classifier of transformers with one output."""

    def __init__(self, args):
        self.name = args.reward
        with common.user_errors(f"--reward {self.name} cannot be used"):
            self.folder = model_files.model_folder(self.name, weights=True)
            config = json.loads((self.folder / "config.json").read_text())
            names = config.get("architectures") or ["of no class"]
            if "auto_map" in config or not names[0].endswith("ForSequenceClassification"):
                raise ValueError(f"it is {names[0]}, and {NEEDED}")
            outputs = model_files.read_config(self.folder).num_labels
            if outputs != 1:
                raise ValueError(f"it has {outputs} outputs, and a reward model has one")
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            parts = [model_files.start_fingerprint(self.name, seed=None), torch.cuda.is_available()]
            parts += [self.tokenizer.chat_template, self.tokenizer.backend_tokenizer.to_str()]
            self.id = digest(*parts)

    @cached_property
    def network(self):
        """In bfloat16 on a GPU."""
        cuda = torch.cuda.is_available()
        options = dict(dtype=torch.bfloat16 if cuda else torch.float32, output_loading_info=True)
        options |= dict(use_safetensors=True, trust_remote_code=False)
        network, info = AutoModelForSequenceClassification.from_pretrained(self.folder, **options)
        if info["missing_keys"]:
            raise ValueError(f"{len(info['missing_keys'])} of its tensors are missing")
        return network.eval().to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")

    @torch.inference_mode()
    def score(self, prompt, response):
        """The classifier's output. One chat at a time needs no padding, and its hundreds of tokens
        are enough to keep a GPU busy."""
        ids = chat.to_ids([*prompt, dict(role="assistant", content=response)], self.tokenizer)
        if len(ids) > model_files.position_limit(self.network):
            raise ValueError(f"a chat has {len(ids)} tokens, more than it takes: see --max_length")
        return self.network(torch.tensor([ids], device=self.network.device)).logits.item()


def score_each(reward, examples, args):
    """Sets the examples' scores: from the journals, or computed now, by each process its share."""

    def asks_of(example):
        texts = [x["response"] for x in example.answers]
        return {digest(reward.id, example.prompt, text): (example.prompt, text) for text in texts}

    asks = {key: ask for example in examples for key, ask in asks_of(example).items()}
    done = eval_files.kept("scores", args)
    todo = [key for key in asks if key not in done]
    if mine := todo[rank() :: eval_files.world_size()]:
        with eval_files.open_journal("scores", args) as journal:
            for key in common.progress(mine, "score", unit="answer", disable=rank() > 0):
                with common.user_errors(f"--reward {args.reward} failed"):
                    score = float(reward.score(*asks[key]))
                    if not math.isfinite(score):
                        raise ValueError(f"it returned {score}")
                eval_files.append(journal, dict(key=key, score=score))
    done = eval_files.kept("scores", args)
    for example in examples:
        example.scores = [done[key]["score"] for key in asks_of(example)]


def score_by_judge(judge, examples, args):
    """Sets the examples' scores: an answer's mean over the others and both orders, in [0, 1]."""

    def asks_of(example):
        both_orders = permutations([x["response"] for x in example.answers], 2)
        return {digest(judge.id, example.prompt, *ab): (example.prompt, *ab) for ab in both_orders}

    asks = {key: ask for example in examples for key, ask in asks_of(example).items()}
    verdicts, reasons = eval_judge.ask_judge(judge, asks, args)
    worth = {"a": 1.0, "b": 0.0, "tie": 0.5}  # to the answer shown first
    for example in examples:
        points, own = Counter(), asks_of(example)
        if not own.keys() <= verdicts.keys():
            continue
        for key, (_, a, b) in own.items():
            points[a] += worth[verdicts[key]["verdict"]]
            points[b] += 1 - worth[verdicts[key]["verdict"]]
        shown = max(1, 2 * len(example.answers) - 2)  # how often each answer was judged
        example.scores = [points[x["response"]] / shown for x in example.answers]
    if reasons:
        why = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        common.print0(f"{reasons.total()} verdicts are missing; run again to ask for them. {why}")


# ---- Pairs ----
def drop_reason(example, min_margin):
    """Why a prompt gives no pair, or ""."""
    margin = max(example.scores, default=0) - min(example.scores, default=0)
    reasons = {
        "dropped (fewer than two different answers)": len(example.answers) < 2,
        "dropped (a verdict is missing)": not example.scores,
        "dropped (all answers score alike)": margin == 0,
        f"dropped (a margin below {min_margin:g})": margin < min_margin,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def best_and_worst(scores):
    """The places of the highest and the lowest score, of equal ones the first."""
    return scores.index(max(scores)), scores.index(min(scores))


def row_of(example):
    """A pair as the training scripts read it, and all answers, as sampled, with their scores."""
    texts, tokens = ([x[name] for x in example.answers] for name in ("response", "tokens"))
    places = best_and_worst(example.scores)
    chosen, rejected = ([dict(role="assistant", content=texts[place])] for place in places)
    row = dict(prompt=example.prompt, chosen=chosen, rejected=rejected)
    row["messages"] = example.prompt + chosen  # which sft.py reads
    return row | dict(answers=texts, scores=example.scores, tokens=tokens)


def distributions(rows):
    """{what: {mean and percentiles}} of all answers to the rows' prompts and of the pairs."""
    values = {}
    for name in ("scores", "tokens"):
        values[name] = [x for row in rows for x in row[name]]
        pairs = [[row[name][place] for place in best_and_worst(row["scores"])] for row in rows]
        values[f"{name} of chosen"], values[f"{name} of rejected"] = zip(*pairs, strict=True)
    values["margin"] = np.subtract(values["scores of chosen"], values["scores of rejected"])
    shares = (0, 5, 25, 50, 75, 95, 100)
    return {
        name: {"mean": np.mean(x).item()} | {f"{p}%": np.percentile(x, p).item() for p in shares}
        for name, x in values.items()
    }


def write_pairs(split, examples, made_by, args):
    """Writes <split>.parquet. Prints and returns the counts and the distributions."""
    reasons = [drop_reason(example, args.min_margin) for example in examples]
    rows = [row_of(x) for x, reason in zip(examples, reasons, strict=True) if not reason]
    counts = Counter(reason or "pairs" for reason in reasons)
    summary = ", ".join(f"{count} {what}" for what, count in counts.items())
    print(f"{split}: {len(examples)} prompts: {summary}")
    counts["answers"] = args.num_samples * len(examples)
    counts["different answers"] = sum(len(example.answers) for example in examples)
    print("{different answers} of {answers} answers are not blank and differ".format(**counts))
    if not rows:
        common.fail(f"{split}: no pair is left")
    table = pyarrow.Table.from_pylist(rows)
    table = table.replace_schema_metadata({"sample_pairs": json.dumps(made_by)})
    path = Path(args.output_dir) / f"{split}.parquet"
    with files.atomic_write(path) as unfinished:
        pyarrow.parquet.write_table(table, unfinished)
    figures = distributions(rows)
    print(" " * 18 + "".join(f"{name:>9}" for name in figures["margin"]))
    for name, values in figures.items():
        print(f"{name:18}" + "".join(f"{value:9.4g}" for value in values.values()))
    print(f"written: {path}")
    return dict(prompts=len(examples), counts=counts, distributions=figures)


if __name__ == "__main__":
    try:
        main(common.parse_args(Args))
    except KeyboardInterrupt:
        print("stopped: what was done is kept, and the same command goes on from there", flush=True)
        os._exit(130)  # at once, as it would wait for a request that hangs
