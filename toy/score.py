"""Scores models on the toy world: each answers held-out requests, and the rule of judge.py counts the faults.

    python toy/score.py toy/sft runs/toy/spo

A good answer has no fault. Standard errors are over the requests, a gain's over its differences to the first
model. `distinct` is the share of the good answers that differ from all others to their request, `entropy` the
mean entropy of the model's distribution at each token that it sampled, in nats, `length` the tokens of an
answer, its end token included, and `endless` the share of the answers that came to none.
"""

import argparse
import json
from pathlib import Path

import torch
from judge import grade
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
MAX_NEW_TOKENS = 48  # the longest flawed answer of the data has 36


def held_out_requests(count):
    """The first `count` different requests of the held-out pairs."""
    rows = map(json.loads, (HERE / "data" / "test_prefs.jsonl").read_text().splitlines())
    return list(dict.fromkeys(row["prompt"] for row in rows))[:count]


@torch.no_grad()
def answers(folder, requests, samples, seed):
    """`samples` answers of the model to each request: their texts, request by request, and three tensors of
    (requests, samples): tokens, their summed entropies in nats, and whether an end token was among them."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    torch.manual_seed(seed)
    texts, tokens, entropies, ended = [], [], [], []
    for start in tqdm(range(0, len(requests), 32), str(folder), unit="batch", leave=False):
        chats = [[{"role": "user", "content": text}] for text in requests[start : start + 32]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        ).to(device)
        out = model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            num_return_sequences=samples,
            return_dict_in_generate=True,
            output_logits=True,
        )
        ids = out.sequences[:, inputs["input_ids"].shape[1] :]  # (batch x samples, T)
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
        ends = ids == tokenizer.eos_token_id
        written = ends.cumsum(1) - ends.long() == 0  # (batch x samples, T) all up to the first end token
        entropy = torch.distributions.Categorical(logits=torch.stack(out.logits, 1)).entropy()
        tokens.append(written.sum(1))
        entropies.append((entropy * written).sum(1))
        ended.append(ends.any(1))
    shape = len(requests), samples
    return texts, *(torch.cat(parts).view(shape).cpu().double() for parts in (tokens, entropies, ended))


def score(folder, requests, samples, seed):
    """The figures of one model, the share of good answers to each request, and the first answer to each."""
    texts, tokens, entropies, ended = answers(folder, requests, samples, seed)
    prompts = [request for request in requests for _ in range(samples)]
    grades = torch.tensor(list(map(grade, prompts, texts))).double()
    good = [pair for pair, value in zip(zip(prompts, texts, strict=True), grades, strict=True) if value == 4]
    shares = (grades == 4).double().view(len(requests), samples).mean(1)
    figures = dict(
        model=str(folder),
        good=shares.mean().item(),
        good_se=standard_error(shares),
        grade=grades.mean().item(),
        distinct=len(set(good)) / max(1, len(good)),
        entropy=(entropies.sum() / tokens.sum()).item(),
        length=tokens.mean().item(),
        endless=1 - ended.mean().item(),
    )
    return figures, shares, list(zip(texts[::samples], grades[::samples].int().tolist(), strict=True))


def standard_error(values):
    """Of the mean of independent values (n,)."""
    return (values.std() / len(values) ** 0.5).item()


def main(args):
    for folder in args.models:
        if not (folder / "config.json").is_file():
            raise SystemExit(f"error: there is no model in {folder}: has its run ended?")
    requests = held_out_requests(args.requests)
    results, all_shares, examples = [], [], []
    for folder in args.models:
        figures, shares, first_answers = score(folder, requests, args.samples, args.seed)
        all_shares.append(shares)
        differences = shares - all_shares[0]
        figures |= dict(gain=differences.mean().item(), gain_se=standard_error(differences))
        results.append(figures)
        examples.append(first_answers)

    width = max(map(len, map(str, args.models)))
    print(f"{len(requests)} held-out requests, {args.samples} answers each")
    print(f"{'model':{width}}      good, %        gain     grade  distinct  entropy  length  endless")
    for row in results:
        good, error = 100 * row["good"], 100 * row["good_se"]
        gain, gain_error = 100 * row["gain"], 100 * row["gain_se"]
        print(
            f"{row['model']:{width}}  {good:5.1f} ± {error:.1f}  {gain:+5.1f} ± {gain_error:.1f}"
            f"  {row['grade']:6.2f}  {row['distinct']:8.1%}  {row['entropy']:7.2f}"
            f"  {row['length']:6.1f}  {row['endless']:7.1%}"
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
    parser.add_argument("models", nargs="+", type=Path, help="model folders; gains are over the first")
    parser.add_argument("--requests", type=int, default=128, help="held-out requests to answer")
    parser.add_argument("--samples", type=int, default=8, help="answers to each")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--show", type=int, default=4, help="requests whose first answers are printed")
    parser.add_argument("--json", type=Path, help="file for the figures")
    main(parser.parse_args())
