"""Makes the toy world: toy/model (tokenizer, config, no weights) and toy/data (chats, pairs and
labelled rows).

The task is to name words. Requests come in six phrasings and three kinds (plain, "but not fig", "in
alphabetical order"), each with hundreds of right answers. Flawed answers differ in kind and degree:
words of another category, too many, too few, a broken rule, a wrong format, chatter, a refusal. A
third of the combinations of category and number, two for each number, is in the held-out files
alone.

    python toy/make.py                            the same files again, from a fixed seed
    python sft.py --config recipes/toy.yaml       toy/sft is a copy of the model that this writes
"""

import argparse
import json
import random
from pathlib import Path

import pyarrow.parquet
from judge import CATEGORIES, NUMBERS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

PHRASINGS = [
    "Name {}.",
    "List {}, please.",
    "Can you give me {}?",
    "Please tell me {}.",
    "I need {}.",
    "Write down {}.",
]
REFUSALS = ["I do not know any {}.", "Sorry, I can not name {}.", "There are many {}."]
CHATTER = [
    "I like them all.",
    "They are nice.",
    "There are many more.",
    "I hope it helps.",
    "What do you think?",
    "I could go on.",
]
FORMATS = [  # none of them is a list with commas and one "and"
    dict(separator=" ", last=" ", end=""),
    dict(separator=" and ", last=" and ", end="."),
    dict(separator=". ", last=". ", end="."),
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RIGHT_IN_CHATS = 0.65  # the share of right answers that the SFT model learns from


def combinations():
    """(for training, held out): pairs of category and number, two of each number held out."""
    train, held_out = [], []
    for number in NUMBERS:
        categories = random.Random(number).sample(sorted(CATEGORIES), len(CATEGORIES))
        held_out += [(category, number) for category in categories[:2]]
        train += [(category, number) for category in categories[2:]]
    return train, held_out


def request(rng, pool):
    """A request for one of the combinations: what is asked, and its text."""
    category, number = rng.choice(pool)
    count = NUMBERS[number]
    asked = dict(category=category, number=rng.choice([number, str(count)]), count=count)
    asked["kind"] = rng.choice(["plain", "plain", "without", "sorted"])
    asked["excluded"] = rng.choice(CATEGORIES[category]) if asked["kind"] == "without" else None
    rules = {
        "plain": "",
        "without": f" but not {asked['excluded']}",
        "sorted": " in alphabetical order",
    }
    words = f"{asked['number']} {category}{rules[asked['kind']]}"
    text = rng.choice(PHRASINGS).format(words)
    return asked, text


def right_words(rng, asked, count):
    """Distinct words that the request allows, in its order."""
    words = [word for word in CATEGORIES[asked["category"]] if word != asked["excluded"]]
    words = rng.sample(words, count)
    return sorted(words) if asked["kind"] == "sorted" else words


def written(rng, asked, words, separator=", ", last=" and ", end="."):
    """The words as an answer, half of the time after an opening."""
    opening = rng.choice(["", "", "Sure: ", f"Here are {asked['number']} {asked['category']}: "])
    return opening + separator.join(words[:-1]) + (last if len(words) > 1 else "") + words[-1] + end


def right_answer(rng, asked):
    return written(rng, asked, right_words(rng, asked, asked["count"]))


def wrong_category(rng, asked, words):
    """Most of the words replaced by words of one other category."""
    other = rng.choice(sorted(CATEGORIES.keys() - {asked["category"]}))
    replaced = [rng.choice(CATEGORIES[other]) if rng.random() < 0.6 else word for word in words]
    return replaced if replaced != words else [rng.choice(CATEGORIES[other]), *words[1:]]


def broken_rule(rng, asked, words):
    """The excluded word among them, or the order lost."""
    if asked["kind"] == "without":
        place = rng.randrange(len(words))
        return words[:place] + [asked["excluded"]] + words[place + 1 :]
    shuffled = rng.sample(words, len(words))
    return shuffled if shuffled != words else words[::-1]


def flawed_answer(rng, asked):
    """An answer with a flaw of one kind. In a quarter of those that are lists with the right format
    and without chatter, words of another category come on top."""
    count = asked["count"]
    words = right_words(rng, asked, count)
    flaws = ["wrong", "wrong", "wrong", "more", "fewer", "chatter", "refusal"]
    flaws += ["rule"] * (asked["kind"] != "plain") + ["format"] * (count > 2)
    flaw = rng.choice(flaws)
    if flaw == "refusal":
        return rng.choice(REFUSALS).format(asked["category"])
    if flaw == "format":
        return written(rng, asked, words, **rng.choice(FORMATS))
    if flaw == "chatter":
        return " ".join([written(rng, asked, words), *rng.sample(CHATTER, rng.randint(2, 4))])
    if flaw == "wrong":
        words = wrong_category(rng, asked, words)
    elif flaw == "more":
        words = right_words(rng, asked, count + rng.randint(2, 6))
    elif flaw == "fewer":
        words = words[: max(1, count - rng.randint(1, 3))]
    elif flaw == "rule":
        words = broken_rule(rng, asked, words)
    return written(rng, asked, wrong_category(rng, asked, words) if rng.random() < 0.25 else words)


def turn(role, content):
    return {"role": role, "content": content}


def chat(rng, pool):
    asked, text = request(rng, pool)
    make_answer = right_answer if rng.random() < RIGHT_IN_CHATS else flawed_answer
    answer = make_answer(rng, asked)
    return {"messages": [turn("user", text), turn("assistant", answer)]}


def pair(rng, pool):
    asked, text = request(rng, pool)
    chosen = [turn("assistant", right_answer(rng, asked))]
    rejected = [turn("assistant", flawed_answer(rng, asked))]
    return {"prompt": text, "chosen": chosen, "rejected": rejected}


def labelled(rng, pool):
    asked, text = request(rng, pool)
    label = rng.random() < 0.5
    answer = right_answer(rng, asked) if label else flawed_answer(rng, asked)
    return {"prompt": text, "completion": [turn("assistant", answer)], "label": label}


SPLITS = [
    ("sft", chat, {"train": 40_000, "test": 512}),
    ("prefs", pair, {"train": 2048, "test": 512}),
    ("unpaired", labelled, {"train": 4096, "test": 512}),
]


def make_tokenizer():
    """One token for each word, number and mark; the space before a word is part of it."""
    texts = [
        *PHRASINGS,
        *REFUSALS,
        *CHATTER,
        " but not in alphabetical order Sure: Here are , and",
        "user assistant",
    ]
    texts += [
        "0 1 2 3 4 5 6 7 8 9",
        *NUMBERS,
        *CATEGORIES,
        *(word for words in CATEGORIES.values() for word in words),
    ]
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    vocabulary = {token: place for place, token in enumerate(SPECIAL)}
    for text in texts:
        for token, _ in split.pre_tokenize_str(text.replace("{}", "")):
            vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = split
    marks = [decoders.Replace(f" {mark}", mark) for mark in ",.:?"]
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(), *marks]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        unk_token=SPECIAL[3],
    )


def write_model(folder):
    """A Llama of half a million parameters, without weights: sft.py draws them from its seed."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    config.save_pretrained(folder)


def write_data(folder):
    """Each file has a seed of its own, so that one can change and the others stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, pool in zip(("train", "test"), combinations(), strict=True):
        for name, make_row, sizes in SPLITS:
            rng = random.Random(f"{split} {name}")
            rows = [make_row(rng, pool) for _ in range(sizes[split])]
            if name == "sft":  # as text it would be larger than all else here
                table = pyarrow.Table.from_pylist(rows)
                path = folder / f"{split}_{name}.parquet"
                pyarrow.parquet.write_table(table, path, compression="zstd")
            else:
                lines = [json.dumps(row) + "\n" for row in rows]
                (folder / f"{split}_{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = Path(__file__).parent
    parser.add_argument("folder", nargs="?", default=here, type=Path, help="default: toy/")
    folder = parser.parse_args().folder
    write_model(folder / "model")
    write_data(folder / "data")
    print(f"written: {folder / 'model'}, {folder / 'data'}")
