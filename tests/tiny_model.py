"""A tiny random language model on disk, so that tests of the local model need no network and no seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_model(folder: Path, *, template: str | None = CHAT_TEMPLATE, words: int = 2048) -> Path:
    """Write a random Llama (2 layers, 4 heads) with a byte-level tokenizer and a chat template.

    Its weights are the same each time, and large enough that its answers differ from prompt to prompt.

    Args:
        folder: where to write; made if it isn't there.
        template: the chat template; None for a base model that has none.
        words: the longest prompt in tokens.

    Returns:
        The folder, fit for `hf:<folder>`.
    """
    pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["Ġa", "Ġb", "th", "Ġth", "in", "er", "on", "Ġthe", "ro", "bo"]
    merges = [("Ġ", "a"), ("Ġ", "b"), ("t", "h"), ("Ġ", "th"), ("i", "n"), ("e", "r"), ("o", "n"), ("Ġth", "e")]
    merges += [("r", "o"), ("b", "o")]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *merged])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)

    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=words,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
