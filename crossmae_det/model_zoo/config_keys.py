"""The keys that an override of a config can name, and which of them was meant."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from detectron2.config.instantiate import locate
from omegaconf import DictConfig, ListConfig, OmegaConf

# What other tools call the keys of ours, by the last part of the name.
SYNONYMS = {
    "optimizer.lr": "learning_rate base_lr max_lr lr0 blr",
    "optimizer.weight_decay": "wd decay l2",
    "optimizer.params.lr_decay": "layer_decay layer_wise_decay llrd layer_decay_rate",
    "dataloader.train.total_batch_size": "batch_size batch bs ims_per_batch batchsize",
    "dataloader.train.num_workers": "workers num_workers n_workers",
    "dataloader.image_size": "img_size imgsz image_size input_size resolution crop_size",
    "dataloader.train.dataset.names": "train_set train_data train_dataset trainset data dataset",
    "dataloader.test.dataset.names": "val_set val_data val_dataset test_set test_data valset",
    "dataloader.train.dataset.name": "train_set train_data train_dataset data_path data dataset",
    "model.backbone.net.size": "backbone arch architecture model_size model_name vit",
    "model.backbone.net.drop_path_rate": "drop_path droppath stochastic_depth",
    "model.encoder.size": "backbone arch architecture model_size model_name vit",
    "model.roi_heads.num_classes": "classes nc num_class",
    "train.epochs": "epoch num_epochs max_epochs n_epochs",
    "train.max_iter": "iterations iters max_iters num_iters steps max_steps num_steps",
    "train.output_dir": "output out_dir work_dir save_dir out log_dir",
    "train.init_checkpoint": "weights checkpoint pretrained ckpt load_from init finetune",
    "train.device": "gpu cuda",
    "train.seed": "random_seed",
    "train.amp.enabled": "fp16 bf16 mixed_precision precision half use_amp",
    "train.accumulation": "accum_iter accum grad_accum gradient_accumulation_steps accumulate",
    "optimizer.betas": "momentum beta1 beta2 adam_beta1 adam_beta2",
    "train.clip_grad.max_norm": "clip max_grad_norm clip_norm grad_clip gradient_clip_val",
    "train.ema.enabled": "model_ema use_ema",
    "train.early_stopping.patience": "patience early_stop",
    "train.eval_period": "eval_interval val_interval eval_freq eval_every",
    "train.checkpointer.period": "save_interval save_freq save_every save_period",
    "train.log_period": "log_interval print_freq log_every",
    "lr_multiplier.warmup_iters": "warmup warmup_steps warmup_epochs",
}


def did_you_mean(cfg: DictConfig, key: str) -> str:
    """A hint at the key that was probably meant, as the end of a sentence; "" without one."""
    close = _similar_keys(cfg, key)
    return f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""


def parameters(node: DictConfig) -> tuple[list[str], bool]:
    """Names of the arguments that a LazyCall's function takes, and whether it takes any others."""
    target = node.get("_target_")
    if target is None:
        return [], False
    function: Callable = locate(target) if isinstance(target, str) else target
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return names, any(p.kind == p.VAR_KEYWORD for p in parameters)


def _keys(node: DictConfig | ListConfig, prefix: str = "") -> Iterator[str]:
    """Every key that an override can name, without those of LazyCalls that references share."""
    names: Sequence[Any] = list(node) if isinstance(node, DictConfig) else range(len(node))
    for name in names:
        if str(name).startswith("_"):
            continue
        key = f"{prefix}{name}"
        yield key
        if not OmegaConf.is_interpolation(node, name) and OmegaConf.is_config(node[name]):
            yield from _keys(node[name], f"{key}.")
    if isinstance(node, DictConfig):
        yield from (f"{prefix}{name}" for name in parameters(node)[0] if name not in node)


def _letters(name: str) -> str:
    return re.sub(r"[-_]", "", name.lower())


def _similar_keys(cfg: DictConfig, key: str) -> list[str]:
    """At most two keys that may have been meant: by meaning, by name, by spelling."""
    keys = sorted(set(_keys(cfg)) - {key}, key=lambda k: (k.count("."), k))
    parent, _, last = key.rpartition(".")
    word = _letters(last)
    by_meaning = [k for k, names in SYNONYMS.items() if word in _letters(names).split()]
    if by_meaning := [k for k in by_meaning if k in keys]:
        return by_meaning[:1]
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == parent}
    if same := [k for name, k in siblings.items() if _letters(name) == word]:
        return same[:1]
    if close := difflib.get_close_matches(last, siblings, n=1, cutoff=0.6):
        return [siblings[close[0]]]
    same_name = [k for k in keys if k.rpartition(".")[2] == last]
    if same_name:
        return difflib.get_close_matches(key, same_name, n=2, cutoff=0.0)
    if parent not in keys and (close := difflib.get_close_matches(key, keys, n=1, cutoff=0.75)):
        return close
    words = {k.rpartition(".")[2]: k for k in reversed(keys)}
    if close := difflib.get_close_matches(last, words, n=1, cutoff=0.75):
        return [words[close[0]]]
    return []
