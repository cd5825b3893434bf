"""Names of tensors that transformers changes as it loads a checkpoint: files, and adapters, may have either."""

from __future__ import annotations

import re

# What a canonical name on disk may have to become to be the name of a parameter of the model.
RENAMES = (
    (r"\bLayerNorm\.gamma$", "LayerNorm.weight"),
    (r"\bLayerNorm\.beta$", "LayerNorm.bias"),
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
RENAMED = re.compile("|".join(pattern for pattern, _ in RENAMES))  # most names are not, which one look tells


def meanings(name: str) -> list[str]:
    """`name`, and what it becomes by any of the renamings, in order: versions of transformers differ in how many."""
    names = [name]
    if not RENAMED.search(name):
        return names
    for pattern, replacement in RENAMES:
        names += [renamed for each in names if (renamed := re.sub(pattern, replacement, each)) != each]
    return names
