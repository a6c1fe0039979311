"""Which layers an architecture adapts by default, by the names transformers 5 gives them.

Encoders follow the paper (query, value and every dense layer); decoders take query and value as published for Llama.
"""

_BERT = ["query", "value", "dense"]
_DECODER = ["q_proj", "v_proj"]
_VISION = ["q_proj", "v_proj", "o_proj", "fc1", "fc2"]

DEFAULT_TARGETS: dict[str, list[str]] = {
    **dict.fromkeys(
        ["bert", "roberta", "xlm-roberta", "electra", "camembert", "mpnet_bert", "layoutlm", "ernie", "data2vec-text"],
        _BERT,
    ),
    "albert": ["query", "value", "dense", "ffn", "ffn_output"],
    "mpnet": ["q", "v", "o", "dense"],
    "distilbert": ["q_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "deberta": ["in_proj", "dense"],
    "deberta-v2": ["query_proj", "value_proj", "dense"],
    "modernbert": ["Wqkv", "Wo", "Wi"],
    **dict.fromkeys(["vit", "deit", "vit_msn", "vit_mae"], _VISION),
    "dinov2": ["query", "value", "dense", "fc1", "fc2"],
    "beit": ["query", "value", "dense"],
    "swin": ["query", "value", "dense"],
    **dict.fromkeys(["clip", "siglip", "siglip2"], ["q_proj", "v_proj", "fc1", "fc2"]),
    **dict.fromkeys(
        "llama llama4 mistral mistral3 mixtral qwen2 qwen3 gemma gemma2 gemma3 gemma3_text olmo olmo2 cohere cohere2 "
        "stablelm smollm3 granite starcoder2 gptj gpt_neo opt".split(),
        _DECODER,
    ),
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "phi3": ["qkv_proj"],
    **dict.fromkeys(["gpt2", "gpt_bigcode"], ["c_attn"]),
    **dict.fromkeys(["gpt_neox", "bloom", "falcon"], ["query_key_value"]),
    "mpt": ["Wqkv"],
    **dict.fromkeys(["t5", "mt5", "umt5"], ["q", "v"]),
    **dict.fromkeys(["bart", "mbart", "pegasus", "marian", "whisper", "blenderbot"], _DECODER),
}
