"""Hugging Face models with random weights, small enough to prune in a test, and batches for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

WORDS = 60


def small(name: str, seed: int = 0) -> Any:
    """The model of that name: two blocks in each stack, 32 channels, its cache of keys and values on."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    made: nn.Module
    match name:
        case "llama":
            config = transformers.LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                vocab_size=WORDS,
                max_position_embeddings=64,
            )
            made = transformers.LlamaForCausalLM(config)
        case "gpt2":
            config = transformers.GPT2Config(
                n_embd=32, n_layer=2, n_head=4, vocab_size=WORDS, n_positions=64, bos_token_id=1, eos_token_id=1
            )
            made = transformers.GPT2LMHeadModel(config)
        case "t5":
            config = transformers.T5Config(
                d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=WORDS, decoder_start_token_id=0
            )
            made = transformers.T5ForConditionalGeneration(config)
        case "bart":
            config = transformers.BartConfig(
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                vocab_size=WORDS,
                max_position_embeddings=64,
                init_std=0.2,
            )
            made = transformers.BartForConditionalGeneration(config)
        case "xlnet":
            config = transformers.XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=48, vocab_size=WORDS)
            made = transformers.XLNetModel(config)
        case "clip":
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
            text = sizes | {"vocab_size": WORDS, "max_position_embeddings": 16, "eos_token_id": WORDS - 1}
            config = transformers.CLIPConfig(
                text_config=text, vision_config=sizes | {"image_size": 12, "patch_size": 4}, projection_dim=16
            )
            made = transformers.CLIPModel(config)
        case _:
            raise ValueError(name)
    return made.eval()


def ids(texts: int, tokens: int) -> Tensor:
    """Random words."""
    return torch.randint(4, WORDS, (texts, tokens))


def reals(texts: int, tokens: int, count: int) -> Tensor:
    """An attention mask [texts, tokens] with so many real tokens in each text."""
    return (torch.arange(tokens) < count).long().expand(texts, tokens).clone()


def small_batches(name: str, count: int = 4, seed: int = 1) -> list[dict[str, Tensor]]:
    """Batches of 3 texts, such as the model takes by default."""
    torch.manual_seed(seed)
    both = name in ("t5", "bart")
    return [{"input_ids": ids(3, 9)} | ({"decoder_input_ids": ids(3, 6)} if both else {}) for _ in range(count)]
