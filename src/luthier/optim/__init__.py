"""Optimisers and rules of optimisers beyond those that `optim` names: one file each.

A file declares `Config`, its keys; `wanted(config, task)`, whether a run asks for it; `PACKAGES`, what must be
installed; `build(model, config, task)`, which makes the optimiser; and, where something does not go together,
`check(config, task)`, which says so before data and model are read. What `optim` names is made by transformers.
"""
