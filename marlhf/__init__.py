"""MA-RLHF: reinforcement learning from human feedback with macro actions (Chai et al., ICLR 2025).

A policy still samples one token at a time; the learner groups consecutive tokens of a response into
macro actions and assigns credit between those. `segment` says where a macro action ends, `macro`
pools rewards and values into macro actions and runs GAE over them, `objectives` holds the losses,
`ppo` puts them into a trainer. Importing the package imports none of them; these load on first use:

    config = marlhf.load_config("tldr-tiny", "ppo.lam=0.99")
    run = marlhf.run("ppo", config)
"""

import importlib

__version__ = "0.1.0"
_HOMES = {"load_config": "config", "run": "experiment", "Experiment": "experiment", "Run": "runs"}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'marlhf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"marlhf.{_HOMES[name]}"), name)
