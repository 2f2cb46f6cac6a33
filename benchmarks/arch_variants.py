"""Configurations beside each class's own, for `benchmarks.architectures`: groups, odd sizes, ties.

A name begins with its class; what follows says what is other. Values are those of the small
model, set after it was made small.
"""

from typing import Any

_ODD = {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12}
_ODD |= {"intermediate_size": 77, "vocab_size": 101}

VARIANTS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel, untied": {"tie_word_embeddings": False},
    "GPT2LMHeadModel, of odd sizes": {"n_embd": 45, "n_head": 5, "n_inner": 31, "vocab_size": 97},
    "LlamaForCausalLM, tied, with biases": {
        **{"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    },
    "LlamaForCausalLM, of odd sizes": _ODD,
    # in float32, the only type that these products know
    "MixtralForCausalLM, grouped products": {"_experts_implementation": "grouped_mm"},
    "MixtralForCausalLM, batched products": {"_experts_implementation": "batched_mm"},
    "GptOssForCausalLM, grouped products": {"_experts_implementation": "grouped_mm"},
    "Qwen2MoeForCausalLM, batched products, of odd sizes": {
        **{"_experts_implementation": "batched_mm", "num_experts": 5, "moe_intermediate_size": 33},
    },
    "DeepseekV3ForCausalLM, two groups of experts": {"n_group": 2, "topk_group": 1},
    "T5ForConditionalGeneration, gated": {
        **{"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True},
    },
    "BartForConditionalGeneration, scaled, of odd sizes": {
        **{"scale_embedding": True, "d_model": 44, "encoder_ffn_dim": 31, "decoder_ffn_dim": 53},
    },
    "MarianMTModel, apart": {
        **{"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False},
        **{"decoder_vocab_size": 91},
    },
    "BertLMHeadModel, a decoder": {"is_decoder": True, "add_cross_attention": True},
    "SwinForImageClassification, windows that do not fit": {
        **{"window_size": 3, "image_size": 28, "depths": [2, 1], "num_heads": [2, 4]},
        **{"embed_dim": 12, "drop_path_rate": 0.0},
    },
    "Swinv2ForImageClassification, windows that do not fit": {
        **{"window_size": 3, "image_size": 28, "depths": [2, 1], "num_heads": [2, 4]},
        **{"embed_dim": 12, "pretrained_window_sizes": [2, 2], "drop_path_rate": 0.0},
    },
    "ViTForImageClassification, of odd sizes": {
        **{"image_size": 35, "patch_size": 7, "hidden_size": 27, "num_attention_heads": 3},
    },
    "RegNetForImageClassification, groups of three": {
        **{"embedding_size": 12, "hidden_sizes": [12, 24], "depths": [1, 2], "groups_width": 3},
    },
    "Wav2Vec2ForCTC, layer norm, many groups": {
        **{"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True},
        **{"num_conv_pos_embeddings": 7, "num_conv_pos_embedding_groups": 32, "add_adapter": True},
    },
    "BambaForCausalLM, groups": {"mamba_n_groups": 4, "mamba_d_state": 6, "mamba_conv_bias": False},
    "SegformerForSemanticSegmentation, of odd sizes": {
        **{"hidden_sizes": [9, 15, 21, 33], "num_attention_heads": [1, 3, 3, 3]},
        **{"drop_path_rate": 0.0, "decoder_hidden_size": 13},
    },
    "WhisperForConditionalGeneration, scaled, untied": {
        **{"scale_embedding": True, "tie_word_embeddings": False, "num_mel_bins": 11},
    },
    "UNet2DConditionModel, linear projections": {
        **{"use_linear_projection": True, "attention_head_dim": 3, "norm_num_groups": 3},
        **{"block_out_channels": (12, 24), "layers_per_block": 1, "cross_attention_dim": 10},
        **{"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
        **{"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "class_embed_type": None},
    },
    "AutoencoderKL, of odd sizes": {
        **{"block_out_channels": (6, 15), "norm_num_groups": 3, "latent_channels": 5},
        **{"down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1},
        **{"up_block_types": ("UpDecoderBlock2D",) * 2, "sample_size": 18},
    },
}
