"""Encoders: images (ViT, DINOv2) and text (BERT, RoBERTa, sentence encoders of their shape)."""

from featcal_fast.models.family import Family, Stage

VIT = Family(
    name="ViT",
    models="ViT, DINOv2",
    roots=("", "vit", "deit", "dinov2"),
    marks=("embeddings.cls_token", "embeddings.patch_embeddings", "layernorm"),
    stages=(Stage(("layers", "encoder.layer", "encoder.layers")),),
    note="all tokens weigh the same; pooler and classifier keep their merged values",
)

BERT = Family(
    name="BERT",
    models="BERT, RoBERTa and sentence encoders on them",
    roots=("", "bert", "roberta"),
    marks=("embeddings.word_embeddings", "embeddings.token_type_embeddings"),
    stages=(Stage(("encoder.layer", "layers")),),
    note="post-norm blocks; pooler and heads keep their merged values",
)
