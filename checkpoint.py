"""Checkpoints: a folder that is all that resuming, sampling and plotting need.

    out_dir/latest/, out_dir/best/
        weights.safetensors     the model
        config.json             how to make it and what it was doing: "model", "train", "tokenizer", "step", ...
        optimizer.pt            what only resuming needs

A checkpoint is written beside its place and moved there whole. Two renames do it, so for an instant only NAME.old may
exist; reading knows. `best` shares its files with the `latest` it was: they are replaced, never written to again.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data import tokenizer
from model import GPT, GPTConfig


def save(out_dir, model, optimizer_state, info, best=False):
    """Write out_dir/latest, and out_dir/best with the same content if best; info becomes config.json."""
    temporary, linked = (Path(out_dir) / f"{name}.{os.getpid()}.tmp" for name in ("latest", "best"))
    remove_unfinished(out_dir)
    try:
        temporary.mkdir(parents=True)
        weights = {name: p.detach().cpu().contiguous() for name, p in model.state_dict().items()}
        save_file(weights, temporary / "weights.safetensors")
        torch.save(optimizer_state, temporary / "optimizer.pt")
        (temporary / "config.json").write_text(json.dumps(info, indent=1, ensure_ascii=False), encoding="utf-8")
        if best:
            shutil.copytree(temporary, linked, copy_function=_link_or_copy)
            _move_into_place(linked, Path(out_dir) / "best")
        _move_into_place(temporary, Path(out_dir) / "latest")
    except BaseException:
        remove_unfinished(out_dir)
        raise


def remove_unfinished(out_dir):
    """Remove what a save left that was killed, or failed."""
    for name in ("latest", "best"):
        for path in Path(out_dir).glob(f"{name}.*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


def _link_or_copy(source, target):
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _move_into_place(new, place):
    for path in new.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    old = place.with_name(place.name + ".old")
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(place, old)
    os.rename(new, place)
    shutil.rmtree(old, ignore_errors=True)


def find(path):
    """The checkpoint folder that `path` is, or else holds as best or latest; ValueError if none is there."""
    path = Path(path)
    return path if (path / "config.json").is_file() else find_in_run(path, ("best", "latest"))


def find_in_run(out_dir, names):
    """The first of the checkpoints named that a run's folder holds; ValueError if none is there."""
    for candidate in (Path(out_dir) / (name + end) for name in names for end in ("", ".old")):
        if (candidate / "config.json").is_file():
            return candidate
    raise ValueError(
        f"no checkpoint in {out_dir}; it should hold {' or '.join(names)}/config.json, which train.py writes"
    )


# What config.json must hold.
TYPES = dict(model=dict, train=dict, tokenizer=dict, step=int, best_val_loss=float | None, seconds=float)
TYPES.update(schedule_end=int, arithmetic=str, data_fingerprint=str)


def read_info(folder):
    """config.json of a checkpoint folder."""
    try:
        info = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(info, dict) or not set(info) >= set(TYPES):
            raise ValueError("it lacks what train.py writes")
        for name, kind in TYPES.items():
            if not isinstance(info[name], kind):
                raise ValueError(f"{name} is {info[name]!r}")
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {error}; {_remedy(folder)}") from None
    return info


def load_weights(folder, model):
    """Load weights.safetensors into the model; ValueError if the file is missing, damaged or another model's."""
    path = folder / "weights.safetensors"
    try:
        model.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {_remedy(folder)}") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); {_remedy(folder)}") from None
    except RuntimeError as error:
        raise ValueError(f"{path} belongs to another model: {str(error).splitlines()[-1].strip()}") from None


def load_optimizer_state(folder):
    path = folder / "optimizer.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"optimizers", "scaler"} <= set(state):
            raise EOFError("it lacks what train.py writes")
        return state
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {_remedy(folder)}") from None
    except Exception as error:  # the unpickler raises whatever the bytes make of it
        raise ValueError(
            f"{path} is damaged ({(str(error) or 'it is empty').splitlines()[0]}); {_remedy(folder)}"
        ) from None


def _remedy(folder):
    other = folder.parent / ("best" if folder.name.startswith("latest") else "latest")
    if (other / "config.json").is_file():
        return f"{other} may be whole: put a copy of it in the place of {folder}"
    return "there is no other checkpoint beside it"


def load_model(path, device="cpu"):
    """(model in eval mode on device, tokenizer, info) of a run's folder or one of its checkpoints.

    Its curves are given by their control points, however they were learned: derived once, not at every token.
    """
    folder = find(path)
    info = read_info(folder)
    try:
        config = GPTConfig(**{**info["model"], "kan_impl": "auto"})  # what it trained with may not run here
    except TypeError as error:
        raise ValueError(f"{folder / 'config.json'} is of another version: {error}") from None
    model = GPT(config)
    load_weights(folder, model)
    for layer in model.kan_layers():
        layer.to_parameterization("bspline")
    words = tokenizer.from_spec(info["tokenizer"])
    if words.vocab_size != config.vocab_size:
        raise ValueError(
            f"{folder / 'config.json'} is damaged: its model has {config.vocab_size} tokens, its tokenizer "
            f"{words.vocab_size}; take another checkpoint"
        )
    return model.to(device).eval(), words, info
