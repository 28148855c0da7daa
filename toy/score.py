"""Scores models on the toy world: each answers held-out requests, and judge.py counts the faults.

    python toy/score.py toy/sft runs/toy/spo

A good answer has no fault. Standard errors are over the requests, a gain's over its differences to
the first model. `distinct` is the share of the good answers that differ from all others to their
request, `entropy` the mean entropy of the model's distribution at each token that it sampled, in
nats, `kl` its Kullback-Leibler divergence from the first model, in nats an answer, `length` the
tokens of an answer, its end token included, and `endless` the share of the answers that came to
none. Answers are sampled as in eval_judge.py, at temperature 1.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from judge import grade
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import data  # noqa: E402
import eval_judge  # noqa: E402

BATCH_SIZE = 256
MAX_NEW_TOKENS = 48  # the longest flawed answer of the data has 36


def held_out_requests(count):
    """The first `count` different requests of the held-out pairs."""
    rows = map(json.loads, (HERE / "data" / "test_prefs.jsonl").read_text().splitlines())
    return list(dict.fromkeys(row["prompt"] for row in rows))[:count]


def open_network(folder):
    """A model's network and tokenizer."""
    model = eval_judge.open_model(str(folder))
    return eval_judge.load_network(model, MAX_NEW_TOKENS), model.tokenizer


def to_ids(request, tokenizer, answer=None):
    """The ids of a request as the model is asked it, or of the request and an answer."""
    chat = [dict(role="user", content=request)]
    if answer is None:
        return data.to_ids(chat, tokenizer, header=True)
    return data.to_ids([*chat, dict(role="assistant", content=answer)], tokenizer)


def answers(network, tokenizer, requests, samples, seed, title):
    """`samples` answers to each request, request by request: a dict each, with its text, tokens and
    entropy, as `generate_all` in eval_judge.py makes them."""
    prompts = {}  # prompt ids, by the answer's key, from which its random numbers come
    for request in requests:
        ids = to_ids(request, tokenizer)
        for sample in range(samples):
            prompts[eval_judge.digest(seed, request, sample)] = ids
    options = dict(batch_size=BATCH_SIZE, temperature=1.0, max_new_tokens=MAX_NEW_TOKENS)
    generated = eval_judge.generate_all(network, tokenizer, prompts, **options)
    lines = dict(tqdm(generated, title, total=len(prompts), unit="answer", leave=False))
    return [lines[key] for key in prompts]


@torch.no_grad()
def kl_divergence(network, start, rows):
    """KL(network || start) in nats an answer, estimated from the network's own answers: at each of
    their tokens exactly, over the vocabulary. rows: (tokens of the prompt, ids with the answer)."""
    total = 0.0
    rows = sorted(rows, key=lambda row: len(row[1]))  # so that little is padded
    for first in range(0, len(rows), BATCH_SIZE):
        batch = rows[first : first + BATCH_SIZE]
        ids = [torch.tensor(whole) for _, whole in batch]
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(network.device)  # (B, T)
        logps = network(ids).logits.float().log_softmax(-1)  # (B, T, V); padding comes last
        others = start(ids).logits.float().log_softmax(-1)
        divergences = (logps.exp() * (logps - others)).sum(-1)  # (B, T), of the token that follows
        for row, (prompt, whole) in zip(divergences, batch, strict=True):
            total += row[prompt - 1 : len(whole) - 1].sum().item()
    return total / len(rows)


def score(folder, requests, samples, seed, start):
    """A model's figures, and for each request its share of good answers and its first answer.
    start: the network of the model that its KL divergence is from."""
    network, tokenizer = open_network(folder)
    lines = answers(network, tokenizer, requests, samples, seed, str(folder))
    texts = [line["response"] for line in lines]
    prompts = [request for request in requests for _ in range(samples)]
    rows = [
        (len(to_ids(prompt, tokenizer)), to_ids(prompt, tokenizer, text))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    grades = torch.tensor(list(map(grade, prompts, texts))).double()
    graded = zip(prompts, texts, grades.tolist(), strict=True)
    good = [(prompt, text) for prompt, text, value in graded if value == 4]
    shares = (grades == 4).double().view(len(requests), samples).mean(1)
    tokens = sum(line["tokens"] for line in lines)
    figures = dict(
        model=str(folder),
        good=shares.mean().item(),
        good_se=standard_error(shares),
        grade=grades.mean().item(),
        grades=torch.bincount(grades.long(), minlength=5).tolist(),
        distinct=len(set(good)) / max(1, len(good)),
        entropy=sum(line["entropy"] for line in lines) / tokens,
        kl=kl_divergence(network, start, rows),
        length=tokens / len(lines),
        endless=sum(line["cut"] for line in lines) / len(lines),
    )
    first_grades = grades[::samples].int().tolist()
    return figures, shares, list(zip(texts[::samples], first_grades, strict=True))


def standard_error(values):
    """Of the mean of independent values (n,)."""
    return (values.std() / len(values) ** 0.5).item()


def main(args):
    for folder in args.models:
        if not (folder / "config.json").is_file():
            raise SystemExit(f"error: there is no model in {folder}: has its run ended?")
    requests = held_out_requests(args.skip + args.requests)[args.skip :]
    start, _ = open_network(args.models[0])
    results, all_shares, examples = [], [], []
    for folder in args.models:
        figures, shares, first_answers = score(folder, requests, args.samples, args.seed, start)
        all_shares.append(shares)
        differences = shares - all_shares[0]
        figures |= dict(gain=differences.mean().item(), gain_se=standard_error(differences))
        results.append(figures)
        examples.append(first_answers)

    width = max(map(len, map(str, args.models)))
    print(f"{len(requests)} held-out requests, {args.samples} answers each")
    columns = "    good, %        gain     grade  distinct  entropy     kl  length  endless"
    print(f"{'model':{width}}  {columns}")
    for row in results:
        good, error = 100 * row["good"], 100 * row["good_se"]
        gain, gain_error = 100 * row["gain"], 100 * row["gain_se"]
        print(
            f"{row['model']:{width}}  {good:5.1f} ± {error:.1f}  {gain:+5.1f} ± {gain_error:.1f}"
            f"  {row['grade']:6.2f}  {row['distinct']:8.1%}  {row['entropy']:7.2f}"
            f"  {row['kl']:5.2f}  {row['length']:6.1f}  {row['endless']:7.1%}"
        )
    for place in [number * len(requests) // args.show for number in range(args.show)]:
        print(f"\n{requests[place]}")
        for folder, first_answers in zip(args.models, examples, strict=True):
            text, value = first_answers[place]
            print(f"  {str(folder):{width}}  {value} of 4  {text}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", type=Path, help="folders; gains are over the first")
    parser.add_argument("--requests", type=int, default=128, help="held-out requests to answer")
    parser.add_argument("--skip", type=int, default=0, help="requests to pass over before these")
    parser.add_argument("--samples", type=int, default=8, help="answers to each")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--show", type=int, default=4, help="requests to print answers to")
    parser.add_argument("--json", type=Path, help="file for the figures")
    main(parser.parse_args())
