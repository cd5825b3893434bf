"""Causal language models: embeddings, a list of pre-norm blocks, a final norm, a head."""

from featcal_fast.models.family import Family, Stage

ROUTED = "a matrix of routed experts, which keep their merged values"
ROUTER = "a router, which keeps its merged value"

DECODER = Family(
    name="Llama-shaped decoder",
    models="Llama 2/3.x, Mistral, Qwen2/2.5/3, Gemma 2/3 (text), Phi-3; Mixtral, Qwen2-MoE, Qwen3-MoE",
    roots=("", "model"),
    marks=("embed_tokens", "rotary_emb"),
    stages=(Stage(("layers",)),),
    forward_kwargs={"use_cache": False},
    keeps={
        "mlp.experts.gate_up_proj": ROUTED,
        "mlp.experts.down_proj": ROUTED,
        "mlp.gate.weight": ROUTER,
    },
    note="RMSNorms, routers and matrices of routed experts keep their merged values; shared experts are calibrated",
)

GPT2 = Family(
    name="GPT-2",
    models="GPT-2, DistilGPT-2",
    roots=("", "transformer"),
    marks=("wte", "wpe", "ln_f"),
    stages=(Stage(("h",)),),
    forward_kwargs={"use_cache": False},
    note="`Conv1D` weights, stored transposed",
)
