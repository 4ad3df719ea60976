"""The table of calls, and how what they return is kept. Runs under both packages."""

import importlib
import json
import warnings
from collections.abc import Mapping
from functools import cached_property

import jax
import numpy as np

CALLS = {}
"""`Class.method`, or `Class.method: what is special`, to the function that makes the call."""

TRANSFORMERS = ("CLIP", "T5")
OF_THE_REFERENCE = {
    "FlaxStableDiffusionSafetyChecker": "diffusers.pipelines.stable_diffusion.safety_checker_flax",
    "CommonSchedulerState": "diffusers.schedulers.scheduling_utils_flax",
}


def call(name):
    """Register a function of a `Package` as the call of that name."""

    def register(function):
        assert name not in CALLS, name
        CALLS[name] = function
        return function

    return register


class Package:
    """One of the two packages, and the folders that it reads."""

    def __init__(self, ours, folder, scratch):
        self.ours, self.folder, self.scratch = ours, folder, scratch
        self.opened = {}

    def __getattr__(self, name):
        """A class of the package, from where its users import it."""
        if name == "CommonSchedulerState" and self.ours:
            return importlib.import_module("flax_diffusion.schedulers").CommonSchedulerState
        if self.ours:
            return getattr(importlib.import_module("flax_diffusion"), name)
        library = "transformers" if any(part in name for part in TRANSFORMERS) else "diffusers"
        return getattr(importlib.import_module(OF_THE_REFERENCE.get(name, library)), name)

    def open(self, name, folder, **options):
        """A class's `from_pretrained` of one of the folders, done once."""
        key = (name, folder, str(options))
        if key not in self.opened:
            self.opened[key] = getattr(self, name).from_pretrained(str(self.folder / folder), **options)
        return self.opened[key]

    def new_folder(self):
        """An empty folder to write into."""
        folder = self.scratch / str(len(list(self.scratch.iterdir())))
        folder.mkdir()
        return folder

    @cached_property
    def rng(self):
        raise AttributeError("draw by seed, so that a call does not depend on those before it")


def normal(seed, *shape):
    """Normal numbers, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def leaves(value, path=""):
    """Paths and leaves of what a call returned."""
    if isinstance(value, Mapping):
        pairs = [(str(key), value[key]) for key in sorted(value, key=str)]
    elif isinstance(value, (list, tuple)):
        pairs = [(str(number), part) for number, part in enumerate(value)]
    else:
        return [(path, value)]
    empty = [] if pairs else [(path, type(value).__name__)]
    return empty + [leaf for key, part in pairs for leaf in leaves(part, f"{path}/{key}")]


def kept(name, function, package):
    """What a call gives: its arrays by path, and a text for every leaf, or for what it raises."""
    arrays, texts = {}, {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = leaves(function(package))
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__[:-3]]
        return {}, {"raises": json.dumps(kinds), "message": str(error).split("\n")[0][:200]}
    for path, leaf in found:
        if isinstance(leaf, (np.ndarray, jax.Array)):
            texts[path] = f"{leaf.dtype}{list(leaf.shape)}"
            wide = leaf.astype(np.float32) if leaf.dtype.name in ("bfloat16", "float16") else leaf
            arrays[f"{name}|{path}"] = np.asarray(wide)
        else:
            texts[path] = json.dumps(leaf, default=lambda value: type(value).__name__)
    return arrays, texts
