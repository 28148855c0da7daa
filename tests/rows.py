"""Rows and their tokenizers for the test_data_*.py files: five families' chat templates with what
they are to write, tokenizers, files of rows, and fixtures that load them."""

import csv
import itertools
import json
import re
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

import dpo


# ---- Chat templates ----
class Style(NamedTuple):
    """A chat template as its model has it, and in format strings what it is to write."""

    template: str
    special: tuple  # tokens; the first one pads
    eos: str  # the tokenizer's, which need not be the one that ends a turn
    end: str  # the token that ends a turn
    header: str  # opens the assistant's turn
    user: str
    system: str = ""  # "": the template refuses a system turn
    opening: str = ""  # stands where there is no system turn
    bos: str = ""  # the template writes one, and the tokenizer adds one to plain text
    lead: str = ""  # between header and answer
    last: str = ""  # in front of the last answer alone
    after: str = ""  # white space after the end token
    strips: bool = False  # the template strips what is said


ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
)
QWEN25 = Style(
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role != 'system' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
    end="<|im_end|>",
    header="<|im_start|>assistant\n",
    user="<|im_start|>user\n{}<|im_end|>\n",
    system="<|im_start|>system\n{}<|im_end|>\n",
    opening="<|im_start|>system\nYou are Qwen.<|im_end|>\n",
    after="\n",
)
QWEN3 = QWEN25._replace(
    template="{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' and loop.last %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{- message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
    opening="",
    last="<think>\n\n</think>\n\n",
)
LLAMA3 = Style(
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] +"
    " '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    special=(
        "<|end_of_text|>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    eos="<|end_of_text|>",
    end="<|eot_id|>",
    header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    bos="<|begin_of_text|>",
    strips=True,
)
MISTRAL = Style(
    "{{ bos_token }}{% for message in messages %}"
    + ALTERNATE
    + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}",
    special=("<unk>", "<s>", "</s>"),
    eos="</s>",
    end="</s>",
    header="",
    user="[INST] {} [/INST]",
    bos="<s>",
    lead=" ",
)
GEMMA2 = Style(
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'assistant' %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    special=("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    eos="<eos>",
    end="<end_of_turn>",
    header="<start_of_turn>model\n",
    user="<start_of_turn>user\n{}<end_of_turn>\n",
    bos="<bos>",
    after="\n",
    strips=True,
)
STYLES = {"qwen2.5": QWEN25, "qwen3": QWEN3, "llama3": LLAMA3, "mistral": MISTRAL, "gemma2": GEMMA2}
each_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


def answer_of(style, content, last=True):
    """What of an answer is scored."""
    said = content.strip() if style.strips else content
    return style.last * last + style.lead + said + style.end


def render(style, messages, header=False):
    """The text that the style's template is to write."""
    turns = [(turn["role"], turn["content"]) for turn in messages]
    text = style.bos
    if turns[0][0] != "system":
        text += style.opening
    elif style.system:
        text += style.system.format(turns.pop(0)[1])
    else:  # folded into the first question
        turns[:2] = [("user", f"{turns[0][1]}\n\n{turns[1][1]}")]
    for i, (role, content) in enumerate(turns):
        if role == "user":
            text += style.user.format(content.strip() if style.strips else content)
        else:
            text += style.header + answer_of(style, content, i == len(turns) - 1) + style.after
    return text + style.header * header


# ---- Tokenizers ----
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_of(style):
    """tiny's tokenizer with a style's template and tokens, which splits words and lines as Llama
    3's does."""
    tokenizer = tiny.tokenizer(style.template, style.special, eos=style.eos)
    words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    if style is QWEN3:
        tokenizer.add_tokens(["<think>", "</think>"])
    if style.bos:
        tokenizer.bos_token = style.bos
        surround(tokenizer, f"{style.bos} $A", style.bos)
    return tokenizer


def surround(tokenizer, single, *tokens):
    """Lets the tokenizer itself add special tokens, as Llama's and Gemma's do."""
    added = [(token, tokenizer.convert_tokens_to_ids(token)) for token in tokens]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=added
    )


def sentencepiece_tokenizer(template):
    """A tokenizer as Llama 2's and Mistral's: a space is ▁, and one leads each piece of text."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    bytes_to_text = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), *bytes_to_text])
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(special_tokens=special, show_progress=False)
    bpe.train_from_iterator(tiny.WORDS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


# ---- Rows ----
def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = system("Be brief.\nBe kind.")
QUESTION, SECOND, THIRD = user("Where is the\nfox? "), user("And {now}?"), user("Which <b>?")
ANSWERS = [" over there", "in the den\n", "here:\n\n- den\n-  hill", "<b>là</b> 漢字 🦊"]
PAIR = dict(chosen=[QUESTION, assistant("over there")], rejected=[QUESTION, assistant("no idea")])
TEXT = dict(prompt="the quick", chosen=" brown fox", rejected=" lazy dog")
CHAT = dict(messages=PAIR["chosen"])
LABELLED = dict(prompt="the quick", completion=" fox", label=True)


def write_lines(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


# ---- What is made of them ----
@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder where `datasets` keeps what it has read."""
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def load(tmp_path):
    """load(loader, rows or file, tokenizer, settings...) gives the training split."""
    number = itertools.count()

    def load(loader, rows, tokenizer=None, **settings):
        if isinstance(rows, list):
            rows = write_lines(tmp_path / f"rows-{next(number)}.jsonl", rows)
        args = dpo.Args(dataset=str(rows), **dict(batch_size=1, eval_split="") | settings)
        return loader(args, tokenizer or tiny.tokenizer())[0]

    return load


@pytest.fixture
def refusal(load, capsys):
    """refusal(loader, rows or file, ...) gives the one line that `load` ends with."""

    def refusal(*given, **settings):
        with pytest.raises(SystemExit) as stop:
            load(*given, **settings)
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
        return message

    return refusal


@pytest.fixture
def counted(capsys):
    """counted(phrase) gives the sum of the numbers that the last line of counts has with the
    phrase."""
    printed = []

    def counted(phrase):
        printed.extend(re.findall(r"\d+ rows: .*", capsys.readouterr().out))
        return sum(map(int, re.findall(rf"(\d+) [^,:]*{phrase}", printed[-1])))

    return counted


def rows_of(split):
    return [split.rows[i] for i in range(len(split))]


def texts_of(split, tokenizer):
    """[(prompt, response, ...)] as text."""
    texts = [[row["prompt"], *row["responses"]] for row in rows_of(split)]
    return [tuple(map(tokenizer.decode, ids)) for ids in texts]


def scored_texts(split, tokenizer):
    """The scored tokens of each row's only response, as text."""
    rows = [(row["responses"][0], row["scored"][0]) for row in rows_of(split)]
    return [tokenizer.decode(list(itertools.compress(*row))) for row in rows]
