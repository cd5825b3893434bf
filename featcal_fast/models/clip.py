"""CLIP's vision tower, by itself or in a whole CLIP model, in the layouts with and without `vision_model`."""

from featcal_fast.models.family import Family, LastLayerWeights, Stage

CLIP_VISION = Family(
    name="CLIP vision",
    models="CLIP ViT-B/32, B/16, L/14: vision towers and whole `CLIPModel` folders",
    roots=("", "vision_model"),
    marks=("embeddings.class_embedding", "pre_layrnorm"),
    stages=(Stage(("encoder.layers",)),),
    calls_root=True,
    last_layer=LastLayerWeights(rest=0.01, except_modules=("k_proj", "v_proj")),
    outside={"text_model.": "the text tower keeps its merged values"},
    note="last layer: CLS token 1, others 0.01, as published; text tower and projections keep their merged values",
)
