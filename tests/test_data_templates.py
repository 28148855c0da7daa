"""Rows through the chat templates of five model families: token ids, and what of them is scored."""

import itertools

import pytest
import tiny
from rows import (
    ANSWERS,
    CHAT,
    MISTRAL,
    PAIR,
    QUESTION,
    QWEN3,
    SECOND,
    SYSTEM,
    THIRD,
    answer_of,
    assistant,
    cache,
    counted,
    each_style,
    load,
    render,
    rows_of,
    scored_texts,
    sentencepiece_tokenizer,
    texts_of,
    tokenizer_of,
    user,
    write_parquet,
)

import common

FIXTURES = cache, counted, load  # pytest finds them by these names


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
            whole = render(style, data[side]).removesuffix(style.after)
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
@pytest.mark.parametrize(
    "answers", [ANSWERS[:1], ANSWERS[:3], ANSWERS[::-1]], ids=["one", "three", "four"]
)
def test_chat_scores_all_answers_and_no_question(style, first, answers, load):
    questions = itertools.cycle([QUESTION, SECOND, THIRD])
    messages = first + [turn for answer in answers for turn in (next(questions), assistant(answer))]
    tokenizer = tokenizer_of(style)
    chats = [{"messages": messages}, {"messages": messages + [SECOND]}]
    split = load(common.load_chats, chats, tokenizer)
    scored = [answer_of(style, content, last=False) for content in answers[:-1]]
    scored.append(answer_of(style, answers[-1]))
    head = render(style, first + [QUESTION], header=True)
    whole = render(style, messages).removesuffix(style.after)
    # A last question is left out.
    assert texts_of(split, tokenizer) == [(head, whole.removeprefix(head))] * 2
    assert scored_texts(split, tokenizer) == ["".join(scored)] * 2
    assert split.lengths.tolist() == [[sum(row["scored"][0])] for row in rows_of(split)]


@pytest.mark.parametrize("loader", [common.load_pairs, common.load_chats])
def test_template_without_end_token_gets_the_eos_once(loader, load):
    tokenizer = tiny.tokenizer(
        "{% for message in messages %}"
        "{{ message.role + ':' + message.content + '\\n' }}{% endfor %}"
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
        "{% for message in messages %}"
        "{{ '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
        "{{ '[INST] ' + message.content + ' [/INST]' }}{% else %}"
        "{{ message.content + eos_token + ' ' }}{% endif %}{% endfor %}",
    ],
    ids=["zephyr", "mistral-v0.1"],
)
def test_white_space_after_the_end_token_goes_from_sentencepiece_too(template, load):
    tokenizer = sentencepiece_tokenizer(template)
    [row] = rows_of(load(common.load_pairs, [PAIR], tokenizer))
    for ids in row["responses"]:
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1, tokens
    chat = PAIR["chosen"] + PAIR["chosen"]
    split = load(common.load_chats, [{"messages": chat}], tokenizer)
    assert scored_texts(split, tokenizer)[0].replace(" ", "") == "overthere</s>" * 2


def test_no_question_is_scored_where_the_template_moves_the_system_turn(load):
    """Mistral v0.3 and Nemo write the system turn into the last question, and only if no answer
    follows."""
    template = (
        "{%- if messages[0]['role'] == 'system' %}"
        "{%- set system_message = messages[0]['content'] %}"
        "{%- set loop_messages = messages[1:] %}"
        "{%- else %}{%- set loop_messages = messages %}{%- endif %}"
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
    split = load(common.load_chats, [chat], tokenizer)
    assert scored_texts(split, tokenizer) == [" den</s> hill</s>"]


def test_answer_that_begins_like_the_form_of_the_last_one_is_scored_whole(load):
    """`<think>` in plain characters: it begins with the `<` that the first answer begins with."""
    tokenizer = tiny.tokenizer(QWEN3.template)
    chat = [QUESTION, assistant("<b>den</b>"), SECOND, assistant("hill")]
    split = load(common.load_chats, [{"messages": chat}], tokenizer)
    expected = answer_of(QWEN3, "<b>den</b>", last=False) + answer_of(QWEN3, "hill")
    assert scored_texts(split, tokenizer) == [expected]


def test_a_template_that_writes_the_date_gives_the_same_rows_each_day(load):
    template = "{% macro today() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}"
    template += "{{ today() }} {% if strftime_now is defined %}{{ strftime_now('%B') }}{% endif %}"
    template += " {{ date_string }}"
    tokenizer = tiny.tokenizer(template + tiny.CHATML)
    [row] = rows_of(load(common.load_pairs, [PAIR], tokenizer))
    assert tokenizer.decode(row["prompt"]).startswith("2024-07-26 July 26 Jul 2024")


def test_columns_that_parquet_fills_with_none_do_not_reach_the_template(load, tmp_path):
    template = (
        "{% for message in messages if 'tool_calls' in message %}"
        "{{ raise_exception('one call at once') }}{% endfor %}" + tiny.CHATML
    )
    rows = [{"messages": [turn | {"tool_calls": None} for turn in CHAT["messages"]]}]
    path = write_parquet(tmp_path / "rows.parquet", rows)
    assert len(load(common.load_chats, path, tiny.tokenizer(template))) == 1
