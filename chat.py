"""Messages, and their token ids by a tokenizer's chat template. A message is {"role", "content"}, a
turn. What is wrong with one is a ValueError."""

import contextlib
import datetime
import re
import signal
from functools import cache

TEMPLATE_SECONDS = 10  # more, for one row, and a chat template never ends
TEXT = "text"  # the role of a plain string, which goes through no chat template


# ---- Turns of a row ----
def split_turns(row, column):
    """(prompt, completion) as message lists, the completion of one; two strings are plain text."""
    value, prompt = row[column], row.get("prompt")
    if isinstance(value, str) and isinstance(prompt, str):
        return [dict(role=TEXT, content=prompt)], [dict(role=TEXT, content=value)]
    if isinstance(value, str) and prompt is None:
        raise ValueError(f"prompt: the plain string in {column} needs a `prompt` column")
    turns = messages_of(value, "assistant", column)
    asked = messages_of(prompt, "user", "prompt") if prompt else []
    if turns[0]["role"] == "assistant":  # the completion alone
        turns = messages_of(prompt, "user", "prompt") + turns
    elif turns[0]["role"] == "user" and turns[: len(asked)] != asked:
        raise ValueError(f"the prompt is not the beginning of {column}")
    *prompt, last = check_turns(turns, column)
    if last["role"] != "assistant":
        raise ValueError(f"{column} must end with an assistant's turn, not the {last['role']}'s")
    return prompt, [last]


def messages_of(value, role, column):
    """A message list as it is, and a string as one message of `role`; else raises ValueError."""
    if isinstance(value, str):
        return [dict(role=role, content=value)]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column} must be a string or a list of messages, not {value!r:.99}")
    value = [from_sharegpt(message) for message in value]
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{column} has a message whose content is no string: {message!r:.99}")
        if any(message.get(key) for key in ("tool_calls", "function_call", "images")):
            raise ValueError(f"{column} has tool calls or images, which are not read")
    return [dict(role=message.get("role"), content=message["content"]) for message in value]


def from_sharegpt(message):
    """A message, with our keys for ShareGPT's `from` and `value`."""
    if not isinstance(message, dict) or "from" not in message:
        return message
    role = {"human": "user", "gpt": "assistant"}.get(message["from"], message["from"])
    return dict(role=role, content=message.get("value"))


def check_turns(messages, column):
    """The messages. ValueError unless user and assistant alternate, after a system turn if any."""
    roles = [str(message["role"]) for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * len(turns)
    if not turns or turns != expected[: len(turns)]:
        raise ValueError(f"{column} must have user and assistant in turn, not {', '.join(roles)}")
    return messages


# ---- Token ids ----
def to_ids(turns, tokenizer, header=False):
    """Token ids of messages as the chat template writes them, or of plain text with the special
    tokens that the tokenizer adds. `header`: up to where the assistant's next turn begins."""
    if turns[0]["role"] == TEXT:
        text = "".join(turn["content"] for turn in turns)
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids = tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
        if header and ids[-1:] == [tokenizer.eos_token_id]:
            ids.pop()  # the tokenizer's own addition
        return ids
    if tokenizer.chat_template is None:
        lacks = "which this model lacks: --chat_template takes a file or a model that has one"
        raise ValueError(f"messages need a chat template, {lacks}")
    if turns[0]["role"] == "system" and not takes_system(tokenizer):
        content = f"{turns[0]['content']}\n\n{turns[1]['content']}"
        turns = [dict(role="user", content=content), *turns[2:]]
    try:
        text = render(turns, tokenizer, header)
    except Exception as error:  # a template may raise anything
        reason = " ".join(str(error).split())  # all of its lines
        raise ValueError(f"the chat template refuses the messages: {reason}") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


DATE = datetime.date(2024, 7, 26)  # Llama's own; templates that write today's give never the same
FIXED_DATE = "{% macro strftime_now(format) %}{{ format"  # transformers would pass no function
FIXED_DATE += "".join(f" | replace('%{code}', '{DATE:%{code}}')" for code in "dbBmyYaAjHMSIp")
FIXED_DATE += " }}{% endmacro %}"


def render(turns, tokenizer, header):
    """The text of messages."""
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = FIXED_DATE + template
    options = dict(tokenize=False, add_generation_prompt=header, chat_template=template)
    options["date_string"] = f"{DATE:%d %b %Y}"  # of Llama's
    with time_limit(TEMPLATE_SECONDS):
        return tokenizer.apply_chat_template(turns, **options)


@contextlib.contextmanager
def time_limit(seconds):
    """Raises TimeoutError in a block that takes longer."""

    def stop(number, frame):
        raise TimeoutError(f"it takes more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@cache
def takes_system(tokenizer):
    """False where the chat template refuses a system turn (Gemma) or moves it (Mistral)."""
    chat = [dict(role=role, content=role) for role in ("system", "user", "assistant")]
    try:
        return render(chat, tokenizer, False).startswith(render(chat[:2], tokenizer, True))
    except Exception:
        return False


def ensure_end_token(ids, tokenizer):
    """The ids up to the last end token, without the white space after it. If there is none, the
    tokenizer's end token is added."""
    end = len(ids)
    while end and not tokenizer.decode(ids[end - 1 : end]).strip():
        end -= 1
    last = ids[end - 1 : end]
    if last and tokenizer.decode(last, skip_special_tokens=True) == "":  # a special token
        return ids[:end]
    if tokenizer.eos_token_id is None:
        raise ValueError("this model's tokenizer has no end token")
    return ids + [tokenizer.eos_token_id]


def common_prefix(a, b):
    """The number of leading tokens that two lists share."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def has_control_token(turn, tokenizer):
    """Whether a message's text would end a turn, begin one, or pose as another control token."""
    return turn["role"] != TEXT and bool(control_tokens(tokenizer).search(turn["content"]))


@cache
def control_tokens(tokenizer):
    """A pattern of them: some tokenizers do not mark all as special, so by their form, too."""
    form = re.compile(r"<[|｜].*[|｜]>")
    added = tokenizer.added_tokens_decoder.values()
    tokens = [x.content for x in added if x.special or form.fullmatch(x.content)]
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")  # (?!) matches nothing


def unknown_tokens(tokenizer):
    """What looks like a control token in the chat template and is none of this tokenizer's."""
    found = set(re.findall(r"<[|｜][^\s<>{}]+[|｜]>", tokenizer.chat_template))
    return sorted(found - tokenizer.get_vocab().keys())
