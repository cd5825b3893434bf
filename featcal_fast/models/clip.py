"""CLIP's vision tower, in the layouts with and without `vision_model`."""

from featcal_fast.models.family import Family, LastLayerWeights, submodule

CLIP_VISION = Family(
    name="CLIP vision",
    blocks=("encoder.layers", "vision_model.encoder.layers"),
    matches=lambda model: any(
        submodule(model, f"{root}embeddings.class_embedding") is not None
        and submodule(model, f"{root}pre_layrnorm") is not None
        for root in ("", "vision_model.")
    ),
    last_layer=LastLayerWeights(rest=0.01, except_modules=("k_proj", "v_proj")),
)
