"""Tiny random models of the real architectures and data files, made on the spot."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SENTENCE = "the quick brown fox jumps over a lazy dog while seven wizards quietly brew strong tea"
WORDS = f"{SENTENCE} for us all".split()


def tokenizer(template=CHATML, special=SPECIAL, eos="<|im_end|>", size=400):
    """A byte-level BPE, as Qwen's and Llama 3's are, trained on a few words."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    trainer = trainers.BpeTrainer(vocab_size=size, **options)
    bpe.train_from_iterator([" ".join(WORDS), "user assistant system"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token=special[0])
    fast.chat_template = template
    return fast


SIZES = dict(
    vocab_size=400,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=2,
)
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=7, head_dim=8),
    "gemma2": lambda: Gemma2Config(
        **SIZES,
        head_dim=8,
        sliding_window=7,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
}


def model(folder, kind="llama", seed=0, weights=True):
    """Saves a random model with its tokenizer; without `weights` a config alone."""
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)
    with torch.no_grad():  # the usual 0.02 leaves every answer equally likely
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    (network if weights else network.config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def sentences(seed, words=12):
    """Endless sentences of 1 to `words` words."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        length = int(torch.randint(1, words + 1, (), generator=generator))
        chosen = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        yield " ".join(WORDS[i] for i in chosen)


def turn(role, content):
    return {"role": role, "content": content}


def pairs(path, count, seed=0, words=12):
    """A JSON lines file of preference pairs of varying length."""
    text = sentences(seed, words)
    with open(path, "w") as file:
        for _ in range(count):
            prompt = [turn("user", next(text))]
            chosen = prompt + [turn("assistant", next(text))]
            rejected = prompt + [turn("assistant", next(text))]
            file.write(json.dumps(dict(chosen=chosen, rejected=rejected)) + "\n")
    return path


def chats(path, count, seed=0, words=12):
    """A JSON lines file of chats of one to three questions and answers."""
    text = sentences(seed, words)
    with open(path, "w") as file:
        for place in range(count):
            roles = ["user", "assistant"] * (1 + place % 3)
            file.write(json.dumps({"messages": [turn(role, next(text)) for role in roles]}) + "\n")
    return path


def labelled(path, labels, seed=0, words=12):
    """A JSON lines file of a prompt, a completion and one of these labels each."""
    text = sentences(seed, words)
    with open(path, "w") as file:
        for label in labels:
            prompt, completion = [turn("user", next(text))], [turn("assistant", next(text))]
            file.write(json.dumps(dict(prompt=prompt, completion=completion, label=label)) + "\n")
    return path
