"""Optimisers and rules of optimisers beyond those that `optim` names: one file each.

A file declares `Config`, its keys; `wanted(config, task)`, whether a run asks for it; `PACKAGES`, what must be
installed; and `build(model, config, task)`, which makes the optimiser. What `optim` names is made by transformers.
"""
