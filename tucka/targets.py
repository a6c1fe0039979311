"""Which layers an architecture adapts by default, by the names transformers 5 gives them.

Encoders follow the paper (query, value and every dense layer); decoders take query and value as published for Llama.
"""

_BERT = ("query", "value", "dense")
_DECODER = ("q_proj", "v_proj")
_VISION = ("q_proj", "v_proj", "o_proj", "fc1", "fc2")

_BY_TARGETS: list[tuple[tuple[str, ...], str]] = [
    (_BERT, "bert roberta xlm-roberta electra camembert layoutlm ernie data2vec-text"),
    (("query", "value", "dense", "ffn", "ffn_output"), "albert"),
    (("q", "v", "o", "dense"), "mpnet"),
    (("q_lin", "v_lin", "out_lin", "lin1", "lin2"), "distilbert"),
    (("in_proj", "dense"), "deberta"),
    (("query_proj", "value_proj", "dense"), "deberta-v2"),
    (("Wqkv", "Wo", "Wi"), "modernbert"),
    (_VISION, "vit deit vit_msn vit_mae beit swin dinov2"),
    (("q_proj", "v_proj", "fc1", "fc2"), "clip siglip siglip2 phi"),
    (_DECODER, "llama llama4_text mistral mixtral qwen2 qwen3 gemma gemma2 gemma3_text olmo olmo2 cohere cohere2"),
    (_DECODER, "stablelm smollm3 granite starcoder2 gptj gpt_neo opt"),
    (_DECODER, "bart mbart pegasus marian whisper blenderbot"),
    (("qkv_proj",), "phi3"),
    (("c_attn",), "gpt2 gpt_bigcode"),
    (("query_key_value",), "gpt_neox bloom falcon"),
    (("Wqkv",), "mpt"),
    (("q", "v"), "t5 mt5 umt5"),
]

DEFAULT_TARGETS: dict[str, list[str]] = {
    architecture: list(targets) for targets, architectures in _BY_TARGETS for architecture in architectures.split()
}
"""Target modules by transformers' `model_type`."""
