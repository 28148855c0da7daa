"""What load_pairs, load_unpaired and load_chats make of files: ids, masks, counts, errors, cache."""

import csv
import itertools
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import common
import dpo

REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real_rows = pytest.mark.skipif(not REAL.is_dir(), reason="no real rows in ../shared/data")


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
    behind: str = ""  # white space behind the end token
    strips: bool = False  # the template strips what is said


QWEN25 = Style(
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] +"
    " '<|im_end|>\\n' }}{%- else %}{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role != 'system' %}{{- '<|im_start|>' + message.role +"
    " '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
    end="<|im_end|>",
    header="<|im_start|>assistant\n",
    user="<|im_start|>user\n{}<|im_end|>\n",
    system="<|im_start|>system\n{}<|im_end|>\n",
    opening="<|im_start|>system\nYou are Qwen.<|im_end|>\n",
    behind="\n",
)
QWEN3 = QWEN25._replace(
    template="{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{- message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
    opening="",
    last="<think>\n\n</think>\n\n",
)
LLAMA3 = Style(
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] +"
    " '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    special="<|end_of_text|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split(),
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
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
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
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    special=("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    eos="<eos>",
    end="<end_of_turn>",
    header="<start_of_turn>model\n",
    user="<start_of_turn>user\n{}<end_of_turn>\n",
    bos="<bos>",
    behind="\n",
    strips=True,
)
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
STYLES = {"qwen2.5": QWEN25, "qwen3": QWEN3, "llama3": LLAMA3, "mistral": MISTRAL, "gemma2": GEMMA2}
each_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


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


def answer_of(style, content, last=True):
    """What of an answer is scored."""
    return style.last * last + style.lead + (content.strip() if style.strips else content) + style.end


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
    for place, (role, content) in enumerate(turns):
        if role == "user":
            text += style.user.format(content.strip() if style.strips else content)
        else:
            text += style.header + answer_of(style, content, place == len(turns) - 1) + style.behind
    return text + style.header * header


def tokenizer_of(style):
    """tiny's tokenizer with a style's template and tokens, which splits words and lines as Llama 3's does."""
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


def surround(tokenizer, single, token):
    """Lets the tokenizer itself add a special token, as Llama's and Gemma's do."""
    added = [(token, tokenizer.convert_tokens_to_ids(token))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=added
    )


def sentencepiece_tokenizer(template):
    """A tokenizer as Llama 2's and Mistral's: a space is ▁, and one leads each piece of text."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    bpe.train_from_iterator(tiny.WORDS, trainers.BpeTrainer(special_tokens=special, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


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
    """counted(phrase) gives the sum of the numbers that the last line of counts has with the phrase."""
    printed = []

    def counted(phrase):
        printed.extend(re.findall(r"\d+ rows: .*", capsys.readouterr().out))
        return sum(map(int, re.findall(rf"(\d+) [^,:]*{phrase}", printed[-1])))

    return counted


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


def rows_of(split):
    return [split.rows[place] for place in range(len(split))]


def texts_of(split, tokenizer):
    """[(prompt, response, ...)] as text."""
    return [tuple(map(tokenizer.decode, [row["prompt"], *row["responses"]])) for row in rows_of(split)]


def scored_texts(split, tokenizer):
    """The scored tokens of each row's only response, as text."""
    rows = [(row["responses"][0], row["scored"][0]) for row in rows_of(split)]
    return [tokenizer.decode(list(itertools.compress(*row))) for row in rows]


# Chat templates


@each_style
@pytest.mark.parametrize(
    "prompt",
    [[QUESTION], [SYSTEM, QUESTION], [SYSTEM, QUESTION, assistant(" a den?"), SECOND]],
    ids=["question", "system", "turns"],
)
def test_pair_is_the_rendered_text_and_its_last_answer_is_scored(style, prompt, load, counted):
    tokenizer = tokenizer_of(style)
    plain, rows = assistant("no idea"), []
    for content in ANSWERS:
        rows.append(dict(chosen=prompt + [assistant(content)], rejected=prompt + [plain]))
        rows.append(dict(chosen=prompt + [plain], rejected=prompt + [assistant(content)]))
    split = load(common.load_pairs, rows, tokenizer)

    head, end = render(style, prompt, header=True), tokenizer.convert_tokens_to_ids(style.end)
    for row, data in zip(rows_of(split), rows, strict=True):
        assert tokenizer.decode(row["prompt"]) == head
        assert row["prompt"] == tokenizer(head, add_special_tokens=False)["input_ids"]
        for ids, side in zip(row["responses"], ("chosen", "rejected"), strict=True):
            whole = render(style, data[side]).removesuffix(style.behind)
            assert tokenizer.decode(ids) == answer_of(style, data[side][-1]["content"])
            assert row["prompt"] + ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(row["prompt"] + ids) == whole
            assert ids[-1] == end and ids.count(end) == 1
        assert row["scored"] == [[True] * len(ids) for ids in row["responses"]]
        assert row["lengths"] == list(map(len, row["responses"]))
        assert row["tokens"] == len(row["prompt"]) + sum(row["lengths"])
        if style.bos:
            assert row["prompt"].count(tokenizer.bos_token_id) == 1
            assert row["prompt"][0] == tokenizer.bos_token_id
    assert split.lengths.tolist() == [row["lengths"] for row in rows_of(split)]
    assert counted("token") == 0


@each_style
@pytest.mark.parametrize("first", [[], [SYSTEM]], ids=["plain", "system"])
@pytest.mark.parametrize("answers", [ANSWERS[:1], ANSWERS[:3], ANSWERS[::-1]], ids=["one", "three", "four"])
def test_chat_scores_all_answers_and_no_question(style, first, answers, load):
    questions = itertools.cycle([QUESTION, SECOND, THIRD])
    messages = first + [turn for answer in answers for turn in (next(questions), assistant(answer))]
    tokenizer = tokenizer_of(style)
    split = load(common.load_chats, [{"messages": messages}, {"messages": messages + [SECOND]}], tokenizer)
    ends = [answer_of(style, content, place == len(answers)) for place, content in enumerate(answers, 1)]
    head = render(style, first + [QUESTION], header=True)
    whole = render(style, messages).removesuffix(style.behind)
    assert texts_of(split, tokenizer) == [(head, whole.removeprefix(head))] * 2  # a last question is left out
    assert scored_texts(split, tokenizer) == ["".join(ends)] * 2
    assert split.lengths.tolist() == [[sum(row["scored"][0])] for row in rows_of(split)]


@pytest.mark.parametrize("loader", [common.load_pairs, common.load_chats])
def test_template_without_end_token_gets_the_eos_once(loader, load):
    tokenizer = tiny.tokenizer(
        "{% for message in messages %}{{ message.role + ':' + message.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    messages = [user("the"), assistant("fox"), user("quick"), assistant("dog")]
    rows = [dict(chosen=messages, rejected=messages, messages=messages)]
    split = load(loader, rows, tokenizer)
    prompt, response, *_ = texts_of(split, tokenizer)[0]
    assert (prompt + response).replace("\n<|im_end|>", "<|im_end|>") == (
        "user:the\nassistant:fox\nuser:quick\nassistant:dog<|im_end|>"
    )
    if loader is common.load_chats:
        assert scored_texts(split, tokenizer)[0].replace("\n", "") == "foxdog<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + eos_token +"
        " '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
        "{{ '[INST] ' + message.content + ' [/INST]' }}{% else %}{{ message.content + eos_token + ' ' }}"
        "{% endif %}{% endfor %}",
    ],
    ids=["zephyr", "mistral-v0.1"],
)
def test_white_space_behind_the_end_token_goes_from_sentencepiece_too(template, load):
    tokenizer = sentencepiece_tokenizer(template)
    [row] = rows_of(load(common.load_pairs, [PAIR], tokenizer))
    for ids in row["responses"]:
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1, tokenizer.convert_ids_to_tokens(ids)
    chat = PAIR["chosen"] + PAIR["chosen"]
    split = load(common.load_chats, [{"messages": chat}], tokenizer)
    assert scored_texts(split, tokenizer)[0].replace(" ", "") == "overthere</s>" * 2


def test_no_question_is_scored_where_the_template_moves_the_system_turn(load):
    """Mistral v0.3 and Nemo write the system turn into the last question, and only if no answer follows."""
    template = (
        "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
        "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
        "{{- bos_token }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
        "{%- if loop.last and system_message is defined %}"
        "{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}"
        "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
        "{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
    )
    tokenizer = tokenizer_of(MISTRAL._replace(template=template))
    pair = {side: [SYSTEM, *PAIR[side]] for side in PAIR}
    chat = {"messages": [SYSTEM, QUESTION, assistant("den"), SECOND, assistant("hill")]}
    [(_, chosen, rejected)] = texts_of(load(common.load_pairs, [pair], tokenizer), tokenizer)
    assert (chosen, rejected) == (" over there</s>", " no idea</s>")
    assert scored_texts(load(common.load_chats, [chat], tokenizer), tokenizer) == [" den</s> hill</s>"]


def test_answer_that_begins_like_the_form_of_the_last_one_is_scored_whole(load):
    """`<think>` in plain characters: it begins with the `<` that the first answer begins with."""
    tokenizer = tiny.tokenizer(QWEN3.template)
    chat = [QUESTION, assistant("<b>den</b>"), SECOND, assistant("hill")]
    split = load(common.load_chats, [{"messages": chat}], tokenizer)
    expected = answer_of(QWEN3, "<b>den</b>", last=False) + answer_of(QWEN3, "hill")
    assert scored_texts(split, tokenizer) == [expected]


def test_columns_that_parquet_fills_with_none_do_not_reach_the_template(load, tmp_path):
    template = (
        "{% for message in messages if 'tool_calls' in message %}"
        "{{ raise_exception('one call at once') }}{% endfor %}" + tiny.CHATML
    )
    rows = [{"messages": [turn | {"tool_calls": None} for turn in CHAT["messages"]]}]
    path = write_parquet(tmp_path / "rows.parquet", rows)
    assert len(load(common.load_chats, path, tiny.tokenizer(template))) == 1


# Plain text


def test_plain_text_gets_the_end_token_once(load):
    tokenizer = tiny.tokenizer()
    rows = [
        TEXT,
        TEXT | {"chosen": " fox<|im_end|>", "rejected": " dog<|im_end|>\n"},
        TEXT | {"chosen": " über\n漢字 ", "rejected": "\n🦊"},
    ]
    assert texts_of(load(common.load_pairs, rows, tokenizer), tokenizer) == [
        ("the quick", " brown fox<|im_end|>", " lazy dog<|im_end|>"),
        ("the quick", " fox<|im_end|>", " dog<|im_end|>"),
        ("the quick", " über\n漢字 <|im_end|>", "\n🦊<|im_end|>"),
    ]


def test_plain_text_gets_the_bos_of_its_tokenizer(load):
    tokenizer = tokenizer_of(LLAMA3)
    answers = (" brown fox<|end_of_text|>", " lazy dog<|end_of_text|>")
    split = load(common.load_pairs, [TEXT, TEXT | {"prompt": ""}], tokenizer)
    expected = [("<|begin_of_text|>the quick", *answers), ("<|begin_of_text|>", *answers)]
    assert texts_of(split, tokenizer) == expected


def test_plain_text_that_begins_with_a_bos_gets_no_second_one(load):
    tokenizer = tokenizer_of(LLAMA3)
    split = load(common.load_pairs, [TEXT | {"prompt": "<|begin_of_text|>the quick"}], tokenizer)
    assert texts_of(split, tokenizer)[0][0] == "<|begin_of_text|>the quick"


def test_tokenizer_that_adds_the_end_token_itself_does_not_split_prompt_from_answer(load, counted):
    tokenizer = tiny.tokenizer()
    surround(tokenizer, "$A <|im_end|>", "<|im_end|>")
    split = load(common.load_pairs, [TEXT], tokenizer)
    expected = ("the quick", " brown fox<|im_end|>", " lazy dog<|im_end|>")
    assert texts_of(split, tokenizer) == [expected]
    assert counted("token") == 0


@pytest.mark.parametrize("merging, other", [("chosen", "rejected"), ("rejected", "chosen")])
def test_prompt_ends_before_a_token_that_straddles_the_boundary(merging, other, load, counted):
    tokenizer = tiny.tokenizer()
    assert len(tokenizer.tokenize(" quick")) == 1
    row = {"prompt": "the qu", merging: "ick fox", other: "!"}
    split = load(common.load_pairs, [row, TEXT], tokenizer)
    prompt, *responses = texts_of(split, tokenizer)[0]
    assert prompt == "the"
    assert dict(zip(("chosen", "rejected"), responses, strict=True)) == {
        merging: " quick fox<|im_end|>",
        other: " qu!<|im_end|>",
    }
    assert counted("token") == 1


def test_plain_text_needs_an_end_token(refusal):
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    refusal(common.load_pairs, [TEXT], tokenizer)


# Forms of data

FORMS = {
    "conversations": dict(PAIR),
    "prompt ignored": PAIR | {"prompt": "something else"},
    "completions, prompt as messages": dict(
        prompt=[QUESTION], chosen=[PAIR["chosen"][1]], rejected=[PAIR["rejected"][1]]
    ),
    "completions, prompt as text": dict(
        prompt=QUESTION["content"], chosen=[PAIR["chosen"][1]], rejected=[PAIR["rejected"][1]]
    ),
    "text, prompt as messages": dict(prompt=[QUESTION], chosen="over there", rejected="no idea"),
    "conversation and completion": dict(
        prompt=[QUESTION], chosen=PAIR["chosen"], rejected=[PAIR["rejected"][1]]
    ),
    "more columns": PAIR | {"score_chosen": 9.5, "messages": [QUESTION], "tags": ["a"]},
    "more keys": PAIR | {"chosen": [QUESTION | {"id": 7}, PAIR["chosen"][1] | {"id": 8}]},
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_pairs_of_every_form_are_the_same(row, load):
    tokenizer = tiny.tokenizer()
    expected = load(common.load_pairs, [PAIR], tokenizer)
    split = load(common.load_pairs, [row], tokenizer)
    assert rows_of(split) == rows_of(expected) and split.fingerprint == expected.fingerprint


@pytest.mark.parametrize("row", [TEXT, *FORMS.values()], ids=["text", *FORMS])
def test_unpaired_rows_and_pairs_taken_apart_are_the_same(row, load):
    tokenizer = tiny.tokenizer()
    apart = load(common.load_unpaired, [row], tokenizer)
    prompt = {"prompt": row["prompt"]} if "prompt" in row else {}
    labelled = [prompt | {"completion": row[side], "label": side == "chosen"} for side in PAIR]
    assert rows_of(apart) == rows_of(load(common.load_unpaired, labelled, tokenizer))
    for column in ({"label": True}, {"completion": "other"}):  # one alone means nothing
        assert rows_of(apart) == rows_of(load(common.load_unpaired, [row | column], tokenizer))
    paired = rows_of(load(common.load_pairs, [row], tokenizer))[0]
    for place, (side, label) in enumerate(zip(rows_of(apart), (True, False), strict=True)):
        assert side["label"] is label and side["prompt"] == paired["prompt"]
        assert side["responses"] == paired["responses"][place : place + 1]
    assert apart.lengths.tolist() == [[length] for length in paired["lengths"]]


def test_chats_from_messages_and_from_prompt_and_completion_are_the_same(load):
    tokenizer = tiny.tokenizer()
    chat = [SYSTEM, QUESTION, assistant("den"), SECOND, assistant("hill")]
    forms = [{"messages": chat, "prompt": "ignored"}]
    forms += [{"prompt": chat[:-1], "completion": answer} for answer in (chat[-1:], chat[-1]["content"])]
    splits = [load(common.load_chats, [row], tokenizer) for row in forms]
    assert rows_of(splits[0]) == rows_of(splits[1]) == rows_of(splits[2])
    text = load(common.load_chats, [dict(prompt="the quick", completion=" fox")], tokenizer)
    assert texts_of(text, tokenizer) == [("the quick", " fox<|im_end|>")]


@each_style
def test_chat_without_an_answer_is_dropped_and_counted(style, load, counted):
    chats = [[QUESTION], [SYSTEM, QUESTION], PAIR["chosen"]]
    split = load(common.load_chats, [{"messages": chat} for chat in chats], tokenizer_of(style))
    assert len(split) == counted("kept") == 1 and counted("dropped") == 2


# Cutting and counting


@pytest.mark.parametrize("loader", [common.load_pairs, common.load_unpaired, common.load_chats])
def test_max_length_cuts_the_end_of_the_answer(loader, load, counted):
    row = PAIR | CHAT
    row["rejected"] = [QUESTION, assistant("no idea at all of the quick brown fox")]
    whole = rows_of(load(loader, [row]))
    prompt, longest = whole[0]["prompt"], max(length for one in whole for length in one["lengths"])
    shortest = min(length for one in whole for length in one["lengths"])
    for room in (1, 2, shortest - 1, shortest, shortest + 1, longest - 1, longest, longest + 1):
        cut = rows_of(load(loader, [row], max_length=len(prompt) + room))
        assert counted("cut") == sum(max(one["lengths"]) > room for one in whole)
        for one, uncut in zip(cut, whole, strict=True):
            assert one["prompt"] == prompt
            assert one["responses"] == [ids[:room] for ids in uncut["responses"]]
            assert one["scored"] == [mask[:room] for mask in uncut["scored"]]
            assert one["lengths"] == [sum(mask[:room]) for mask in uncut["scored"]]
            assert one["tokens"] == len(prompt) + sum(map(len, one["responses"]))


@pytest.mark.parametrize("loader", [common.load_pairs, common.load_unpaired, common.load_chats])
def test_prompt_that_fills_max_length_leaves_nothing(loader, load, refusal):
    row = PAIR | CHAT
    length = len(rows_of(load(loader, [row]))[0]["prompt"])
    for max_length in (length, length - 1, 1):
        assert "no row" in refusal(loader, [row], max_length=max_length)


def test_pairs_that_are_dropped_and_kept_add_up(load, counted):
    rows = [TEXT] * 3 + [
        TEXT | {"chosen": ""},
        TEXT | {"rejected": " \n\t"},
        dict(chosen=[QUESTION, assistant("")], rejected=[QUESTION, assistant("den")]),
        TEXT | {"prompt": "the " * 100},
        TEXT | {"prompt": ""},
        TEXT | {"rejected": TEXT["chosen"]},
        TEXT | {"rejected": " dog" * 100},
    ]
    tokenizer = tiny.tokenizer()
    split = load(common.load_pairs, rows, tokenizer, max_length=60)
    assert counted("rows") == len(rows) == counted("kept") + 5
    assert len(split) == counted("kept") == 5
    assert (counted("empty answer"), counted("fills max_length"), counted("no prompt")) == (3, 1, 1)
    assert counted("identical") == counted("cut") == 1
    assert tokenizer.eos_token_id not in rows_of(split)[-1]["responses"][1]


def test_half_of_a_pair_taken_apart_may_be_dropped(load, counted):
    split = load(common.load_unpaired, [TEXT, TEXT | {"rejected": " "}, TEXT | {"chosen": ""}])
    assert [row["label"] for row in rows_of(split)] == [True, False, True, False]
    assert (counted("rows"), counted("kept"), counted("dropped")) == (3, 4, 2)


def test_chat_whose_last_answer_is_cut_away_keeps_the_others(load):
    tokenizer = tiny.tokenizer()
    chat = {"messages": [QUESTION, assistant("den"), SECOND, assistant("hill")]}
    [row] = rows_of(load(common.load_chats, [chat], tokenizer))
    start = len(row["prompt"]) + row["scored"][0].index(False)  # behind the first answer's end token
    for max_length in (start, start + 1):
        split = load(common.load_chats, [chat], tokenizer, max_length=max_length)
        assert scored_texts(split, tokenizer) == ["den<|im_end|>"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_rare_row_behind_many_plain_ones_is_counted(processes, load, counted, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: processes)
    rows = [TEXT] * 1200
    rows[1100] = TEXT | {"rejected": TEXT["chosen"]}
    rows[1101] = TEXT | {"chosen": ""}
    assert len(load(common.load_pairs, rows)) == 1199
    assert (counted("kept"), counted("identical"), counted("dropped")) == (1199, 1, 1)


# Errors of use

LABELLED = dict(prompt="the quick", completion=" fox", label=True)
BAD_ROWS = {
    "content None": (PAIR, PAIR | {"chosen": [QUESTION, assistant(None)]}, "chosen"),
    "content a number": (PAIR, PAIR | {"rejected": [QUESTION, assistant(5)]}, "rejected"),
    "content in parts": (PAIR, PAIR | {"chosen": [user([{"text": "?"}]), assistant("!")]}, "chosen"),
    "question None": (CHAT, {"messages": [user(None), assistant("den")]}, "messages"),
    "message None": (CHAT, {"messages": [None, QUESTION]}, "messages"),
    "message a string": (CHAT, {"messages": ["den"]}, "messages"),
    "no message": (CHAT, {"messages": []}, "messages"),
    "chat None": (CHAT, {"messages": None}, "messages"),
    "text None": (TEXT, TEXT | {"chosen": None}, "chosen"),
    "text a number": (TEXT, TEXT | {"rejected": 5}, "rejected"),
    "text missing": (TEXT, {"prompt": "the", "rejected": "fox"}, "chosen"),
    "prompt None": (TEXT, TEXT | {"prompt": None}, "prompt"),
    "prompt missing": (FORMS["text, prompt as messages"], {"chosen": "a", "rejected": "b"}, "prompt"),
    "question last": (PAIR, {side: PAIR[side] + [SECOND] for side in PAIR}, "chosen"),
    "two answers running": (PAIR, {side: PAIR[side] + [assistant("!")] for side in PAIR}, "assistant"),
    "two questions running": (CHAT, {"messages": [SECOND, *CHAT["messages"]]}, "user"),
    "assistant first": (CHAT, {"messages": [assistant("hi"), *CHAT["messages"]]}, "assistant"),
    "other roles": (CHAT, {"messages": [{"role": "human", "content": "?"}, assistant("!")]}, "human"),
    "no roles": (CHAT, {"messages": [{"content": "?"}, {"content": "!"}]}, "None"),
    "ShareGPT": (CHAT, {"messages": [{"from": "human", "value": "?"}]}, "messages"),
    "system turn inside": (CHAT, {"messages": [QUESTION, SYSTEM, QUESTION]}, "system"),
    "only a system turn": (CHAT, {"messages": [SYSTEM]}, "system"),
    "different prompts": (PAIR, PAIR | {"rejected": [SECOND, assistant("den")]}, "different prompts"),
    "different system turns": (PAIR, PAIR | {"rejected": [SYSTEM, *PAIR["rejected"]]}, "different prompts"),
    "label a number": (LABELLED, LABELLED | {"label": 1}, "label"),
    "label a string": (LABELLED, LABELLED | {"label": "good"}, "label"),
    "label None": (LABELLED, LABELLED | {"label": None}, "label"),
}


@pytest.mark.parametrize("good, bad, said", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_is_named(good, bad, said, refusal):
    loaders = {"chosen": common.load_pairs, "label": common.load_unpaired, "messages": common.load_chats}
    loader = next(loaders[column] for column in loaders if column in good)
    message = refusal(loader, [good, bad, bad])
    assert "rows-0.jsonl" in message and "row 1:" in message and said in message


def test_bad_row_is_named_from_a_parallel_process(refusal, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    rows = [TEXT] * 1100 + [TEXT | {"prompt": None}] + [TEXT] * 99
    assert "row 1100: prompt" in refusal(common.load_pairs, rows)


@pytest.mark.parametrize(
    "loader, row, needed",
    [
        (common.load_pairs, {"prompt": "q", "chosen": "a"}, "rejected"),
        (common.load_unpaired, {"prompt": "q", "completion": "a"}, "label"),
        (common.load_chats, {"prompt": "q", "chosen": "a"}, "messages"),
    ],
)
def test_missing_column_is_named(loader, row, needed, refusal):
    message = refusal(loader, [row])
    assert "rows-0.jsonl" in message and "prompt" in message and needed in message


@pytest.mark.parametrize("label", [True, 1])
def test_label_column_of_pairs_says_nothing(label, load):
    split = load(common.load_unpaired, [TEXT | {"label": label}])
    assert [row["label"] for row in rows_of(split)] == [True, False]


def test_messages_need_a_template_and_text_does_not(load, refusal):
    tokenizer = tiny.tokenizer(None)
    assert len(load(common.load_pairs, [TEXT], tokenizer)) == 1
    assert "chat template" in refusal(common.load_pairs, [PAIR], tokenizer)


def test_what_a_template_says_against_a_row_is_passed_on(refusal):
    template = "{{ raise_exception('only in\nFrench') }}"
    message = refusal(common.load_pairs, [PAIR], tiny.tokenizer(template))
    assert "rows-0.jsonl: row 0:" in message and "only in French" in message


def test_rows_must_fill_a_batch(load, refusal):
    assert len(load(common.load_pairs, [TEXT] * 3, batch_size=3)) == 3
    assert "--batch_size 4" in refusal(common.load_pairs, [TEXT] * 3, batch_size=4)
    assert "--batch_size 3" in refusal(common.load_pairs, [TEXT, TEXT, TEXT | {"chosen": ""}], batch_size=3)


def test_no_row_left_is_an_error(refusal):
    assert "rows-0.jsonl" in refusal(common.load_pairs, [TEXT | {"chosen": " "}])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_file_without_rows_is_an_error(name, refusal, tmp_path):
    path = tmp_path / name
    path.write_text("[]" if name == "rows.json" else "prompt,chosen,rejected\n" * (name == "rows.csv"))
    if name == "rows.parquet":
        pq.write_table(pa.table({column: pa.array([], pa.string()) for column in TEXT}), path)
    assert name in refusal(common.load_pairs, path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
@pytest.mark.parametrize(
    "content", [b'{"prompt": "the", "chosen":', b"\xff\xfe\x00\x9f", b"PAR1 and no more"]
)
def test_corrupt_file_is_an_error_of_one_line(name, content, refusal, tmp_path, caplog):
    (tmp_path / name).write_bytes(content)
    assert name in refusal(common.load_pairs, tmp_path / name)
    assert not caplog.messages  # what a library logs is a line more


def test_parquet_file_that_was_cut_off_is_an_error(refusal, tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", [TEXT] * 9)
    path.write_bytes(path.read_bytes()[:-20])
    assert "rows.parquet" in refusal(common.load_pairs, path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt", "rows"])
def test_file_that_is_missing_or_of_unknown_ending_is_an_error(name, refusal, tmp_path):
    assert name in refusal(common.load_pairs, tmp_path / "none" / name)
    if name != "rows.jsonl":
        (tmp_path / name).write_text(json.dumps(TEXT))
        assert name in refusal(common.load_pairs, tmp_path / name)


# Files


@pytest.fixture
def folder(tmp_path):
    """Two splits among files of other splits and of no split."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(folder / "train_prefs.jsonl", [TEXT] * 3)
    write_parquet(folder / "test_prefs.parquet", [TEXT | {"chosen": " held out"}] * 2)
    write_lines(folder / "train_sft.jsonl", [CHAT] * 5)
    write_lines(folder / "train_prefs_old.jsonl", [TEXT] * 7)
    (folder / "README.md").write_text("prompt, chosen, rejected")
    return folder


def test_folder_gives_the_named_splits_alone(folder):
    tokenizer = tiny.tokenizer()
    train, held_out = common.load_pairs(dpo.Args(dataset=str(folder), batch_size=2), tokenizer)
    assert len(train) == 3 and len(held_out) == 2
    assert {response for _, response, _ in texts_of(held_out, tokenizer)} == {" held out<|im_end|>"}


@pytest.mark.parametrize("split", ["train_split", "eval_split"])
def test_folder_without_the_split_is_an_error(split, folder, refusal):
    settings = {"eval_split": "test_prefs", split: "absent"}
    message = refusal(common.load_pairs, folder, **settings)
    assert str(folder) in message and "absent" in message


def test_eval_split_of_nothing_and_a_single_file_hold_nothing_out(folder):
    file = str(folder / "train_prefs.jsonl")
    for settings in (dict(dataset=str(folder), eval_split=""), dict(dataset=file)):
        train, held_out = common.load_pairs(dpo.Args(**settings, batch_size=3), tiny.tokenizer())
        assert len(train) == 3 and held_out is None


@pytest.mark.parametrize("row", [PAIR, TEXT, CHAT], ids=["messages", "text", "chat"])
def test_file_formats_give_the_same_rows(row, load, tmp_path):
    loader = common.load_chats if row is CHAT else common.load_pairs
    rows = [row, json.loads(json.dumps(row).replace("the", 'über, \\"漢字\\"\\n🦊'))]
    expected = load(loader, rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    windows = "".join(json.dumps(row) + "\r\n\r\n" for row in rows)
    (tmp_path / "windows.jsonl").write_text(windows, encoding="utf-8-sig", newline="")
    files = [
        tmp_path / "rows.json",
        tmp_path / "windows.jsonl",
        write_parquet(tmp_path / "rows.parquet", rows),
    ]
    files += [write_csv(tmp_path / "rows.csv", rows)] * (row is TEXT)
    for file in files:
        split = load(loader, file)
        assert rows_of(split) == rows_of(expected) and split.fingerprint == expected.fingerprint, file


def test_unpaired_csv_has_labels(load, tmp_path):
    rows = [LABELLED, LABELLED | {"label": False}]
    split = load(common.load_unpaired, write_csv(tmp_path / "rows.csv", rows))
    assert rows_of(split) == rows_of(load(common.load_unpaired, rows))


def test_csv_text_stands_as_it_is_written(load, tmp_path, counted):
    """No number, and no missing value: an answer may be `4`, `None` or `N/A`."""
    rows = [TEXT | {"chosen": "None", "rejected": "4"}, TEXT | {"chosen": "N/A", "rejected": "5"}]
    split = load(common.load_pairs, write_csv(tmp_path / "rows.csv", rows))
    assert rows_of(split) == rows_of(load(common.load_pairs, rows))
    load(common.load_pairs, write_csv(tmp_path / "empty.csv", [TEXT, TEXT | {"chosen": ""}]))
    assert counted("empty answer") == 1


@pytest.mark.parametrize("name", ["a b", "data[1]", "what?", "ünï*"])
def test_any_folder_name_will_do(name, load, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    write_lines(folder / "train_prefs.jsonl", [TEXT])
    assert len(load(common.load_pairs, folder)) == 1
    assert len(load(common.load_pairs, folder / "train_prefs.jsonl")) == 1


# Parallel processes and the cache


def many(count=1100):
    return [TEXT | {"chosen": f" fox {number}", "rejected": " dog" * (number % 7)} for number in range(count)]


def test_parallel_processes_give_the_rows_of_one(load, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    one = load(common.load_pairs, many())
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    two = load(common.load_pairs, many())
    assert one.rows[:] == two.rows[:] and one.fingerprint == two.fingerprint
    assert len(two) == 1100 - 158  # every seventh rejected answer is empty


@pytest.mark.parametrize("count", [3, 1100])
def test_second_load_reads_the_cache(count, load, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    path = write_lines(tmp_path / "rows.jsonl", many(count))
    first = load(common.load_pairs, path)
    written = {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")}
    second = load(common.load_pairs, path)
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")} == written
    assert second.rows[:] == first.rows[:] and second.fingerprint == first.fingerprint


def test_cache_is_not_taken_for_anything_else(load, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [PAIR])
    seen = [rows_of(load(common.load_pairs, path))]
    changes = {
        "loader": lambda: load(common.load_unpaired, path),
        "max_length": lambda: load(common.load_pairs, path, max_length=len(seen[0][0]["prompt"]) + 2),
        "template": lambda: load(common.load_pairs, path, tiny.tokenizer(QWEN25.template)),
        "vocabulary": lambda: load(common.load_pairs, path, tiny.tokenizer(size=300)),
        "data": lambda: load(common.load_pairs, write_lines(path, [PAIR | {"chosen": PAIR["rejected"]}])),
        "text": lambda: load(common.load_pairs, write_lines(path, [TEXT])),
        "end token": lambda: load(common.load_pairs, path, tiny.tokenizer(eos="<|endoftext|>")),
        "post-processor": lambda: load(common.load_pairs, path, tokenizer_of(LLAMA3)),
    }
    for what, change in changes.items():
        assert (rows := rows_of(change())) not in seen, what
        seen.append(rows)


def test_cache_knows_the_special_tokens_that_the_template_writes(load, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [PAIR])
    tokenizer = tiny.tokenizer("{{ bos_token }}" + tiny.CHATML)
    for bos in ("<|endoftext|>", "<|im_start|>"):
        tokenizer.bos_token = bos
        assert rows_of(load(common.load_pairs, path, tokenizer))[0]["prompt"][0] == tokenizer.bos_token_id


# Real rows


def real(name):
    return pq.read_table(REAL / f"{name}.parquet").to_pylist()


def real_tokenizer(style, rows):
    """A style's tokenizer with the words of some rows, so that the rows are few tokens."""
    texts = [message["content"] for row in rows[:200] for message in row["messages"]]
    tokenizer = tokenizer_of(style).train_new_from_iterator(texts, 3000, show_progress=False)
    tokenizer.chat_template = style.template
    return tokenizer


@needs_real_rows
@pytest.mark.parametrize(
    "name, style, count, systems, multi_turn",
    [("train_prefs", GEMMA2, 900, 68, 83), ("test_prefs", LLAMA3, 200, 12, 20)],
    ids=["train", "test"],
)
def test_real_pairs_are_the_rendered_text(name, style, count, systems, multi_turn, load, counted):
    raw = real(name)
    tokenizer = real_tokenizer(style, raw)
    train = load(common.load_pairs, REAL, tokenizer, train_split=name, max_length=10**6)
    assert len(train) == counted("rows") == counted("kept") == count
    found = [0, 0]
    for row, data in zip(rows_of(train), raw, strict=True):
        *prompt, _ = data["chosen"]
        found[0] += prompt[0]["role"] == "system"
        found[1] += len([turn for turn in prompt if turn["role"] == "user"]) > 1
        assert tokenizer.decode(row["prompt"]) == render(style, prompt, header=True)
        for ids, side in zip(row["responses"], PAIR, strict=True):
            assert tokenizer.decode(ids) == answer_of(style, data[side][-1]["content"])
    assert found == [systems, multi_turn]


@needs_real_rows
def test_real_pairs_that_are_cut_add_up(load, counted):
    train = load(common.load_pairs, REAL, train_split="test_prefs", max_length=300)
    assert counted("rows") == 200 == counted("kept") + counted("fills max_length")
    assert len(train) == counted("kept") and 0 < counted("cut") < counted("kept") < 200
    assert max(len(row["prompt"]) + max(row["lengths"]) for row in rows_of(train)) == 300


@needs_real_rows
def test_real_labelled_rows_and_chats(load, counted):
    labelled = load(common.load_unpaired, REAL / "unpaired_kto_en.parquet")
    assert counted("rows") == 300 == counted("kept") + counted("dropped")
    assert [row["label"] for row in rows_of(labelled)].count(True) in range(100, 151)
    raw = real("test_sft")
    tokenizer = tokenizer_of(QWEN25)
    chats = load(common.load_chats, REAL, tokenizer, train_split="test_sft", max_length=10**6)
    assert len(chats) == counted("rows") == 100
    for text, data in zip(scored_texts(chats, tokenizer), raw, strict=True):
        answers = [turn["content"] for turn in data["messages"] if turn["role"] == "assistant"]
        assert text == "".join(answer_of(QWEN25, answer) for answer in answers)
