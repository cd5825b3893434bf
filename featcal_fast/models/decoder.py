"""Llama and the decoders of its shape: embeddings, a list of pre-norm blocks, a final norm, a head."""

from featcal_fast.models.family import Family, submodule

DECODER = Family(
    name="Llama-shaped decoder",
    blocks=("model.layers", "layers"),
    matches=lambda model: any(
        submodule(model, f"{root}embed_tokens") is not None and submodule(model, f"{root}rotary_emb") is not None
        for root in ("", "model.")
    ),
    forward_kwargs={"use_cache": False},
)
