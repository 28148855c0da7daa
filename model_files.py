"""Model folders: finding them, reading weights, what cannot be trained, and what an export needs of
the start model. Nothing here knows of processes. What is wrong with a model is a ValueError, which
common.py shows as one line with its name."""

import hashlib
import math
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import chat
import dataset_files


def model_folder(name, weights=False):
    """A model's folder: `name` itself, or the hub's files, without pickles and code."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError("no config.json, so this is not a whole model")
        return Path(name)
    if name.startswith(("/", "./", "../", "~")):
        raise ValueError("no such folder")
    patterns = ["*.json", "*.jinja", "*.txt", "*.model"]
    if weights:
        patterns.append("*.safetensors")
    options = dict(allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"])  # duplicates
    try:
        return Path(huggingface_hub.snapshot_download(name, **options))
    except Exception as error:  # of the network, the hub, or the name
        problem = f"{dataset_files.NOT_FOUND} ({dataset_files.OFFLINE})"
        raise ValueError(f"{problem}: {type(error).__name__}: {error}") from None


def read_config(folder):
    """The config of a model folder. Code that comes with it is never run, nor asked about."""
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def read_tokenizer(name):
    """The tokenizer of a model."""
    return AutoTokenizer.from_pretrained(model_folder(name), trust_remote_code=False)


def start_fingerprint(name, seed):
    """Identifies the start weights: the hub's commit, hashes of the files, or config and seed."""
    folder = model_folder(name)
    if folder != Path(name):
        return folder.name
    weights = sorted(folder.glob("*.safetensors"))
    files = [np.memmap(path, mode="r") for path in [folder / "config.json", *weights]]
    hashes = [hashlib.sha256(file).hexdigest() for file in files]
    return hashes if weights else [*hashes, seed]


def read_weights(name, seed):
    """The whole model, in the dtype of its files. One without files is drawn from the seed."""
    folder = model_folder(name, weights=True)
    if any(folder.glob("*.safetensors")):
        options = dict(dtype="auto", use_safetensors=True, output_loading_info=True)
        options |= dict(trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
        return model
    pickles = [x.name for x in folder.iterdir() if x.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        raise ValueError(f"pickled weights ({pickles[0]}); only safetensors are read")
    if any(folder.glob("*.safetensors.index.json")) or any(folder.glob("*.incomplete")):
        raise ValueError("its safetensors files are missing")
    if folder != Path(name):
        raise ValueError("the hub has no safetensors of it")
    print(f"WARNING: {name} has a config and no weights: they are drawn at random, by seed {seed}")
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(read_config(folder), dtype=torch.float32)


def tensor_names(folder):
    """The names of all tensors in a folder's safetensors files."""
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


def packable(model):
    """Whether common.packed_attention can take the place of all of a model's attention."""
    odd = set(getattr(model.config, "layer_types", None) or ())
    odd -= {"full_attention", "sliding_attention"}
    sinks = any("sinks" in name for name, _ in model.named_parameters())
    return model._supports_attention_backend and not odd and not sinks


def position_limit(model):
    """The number of positions that a model is made for, or inf."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def refuse_unsupported(model, config, max_length):
    """Raises ValueError for a model, made of this config, that cannot be trained with rows of so
    many tokens."""
    limit = position_limit(model)
    rope = getattr(model.config, "rope_parameters", None) or {}
    by_layer_type = [x for x in rope.values() if isinstance(x, dict)]
    ropes = [rope] if "rope_type" in rope else by_layer_type
    varying = [x for x in ropes if x.get("rope_type") in ("dynamic", "longrope")]
    first = min([limit, *(x.get("original_max_position_embeddings", limit) for x in varying)])
    tables = [x.num_embeddings for x in model.modules() if isinstance(x, torch.nn.Embedding)]
    learned = any(limit <= size <= limit + 8 for size in tables[1:])  # the first is the tokens'
    # Transformers clears Youtu's padding row on loading, although it is trained, as an output.
    cleared = model.config.model_type == "youtu" and model.config.pad_token_id is not None
    lower = f"--max_length {max_length} is above {first if varying else limit} tokens,"
    reasons = {
        "it is multimodal": config.get_text_config() is not config,
        "it is quantized": getattr(config, "quantization_config", None),
        "an export loses its padding token: set pad_token_id null in its config.json": cleared,
        f"{lower} where positions depend on other rows": varying and max_length > first,
        f"{lower} all that it has positions for": learned and max_length > limit,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{type(model).__name__} cannot be trained here: {reason}")


def generation_config(name, tokenizer):
    """A model's generation config, which stops at its own end tokens and at the training rows'."""
    folder = model_folder(name)
    config = GenerationConfig.from_model_config(read_config(folder))
    if (folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(folder)
    if tokenizer.chat_template:
        turns = [dict(role="user", content="?"), dict(role="assistant", content="!")]
        end = chat.ensure_end_token(chat.to_ids(turns, tokenizer), tokenizer)[-1]
        own = end if config.eos_token_id is None else config.eos_token_id  # one or several
        config.eos_token_id = sorted({end, *np.atleast_1d(own).tolist()})
    return config
