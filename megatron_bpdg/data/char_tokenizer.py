"""A tokenizer with one id per character, in Hugging Face's format."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def build_char_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """Tokenizer with ids pad = 0, eos = 1, then the characters of `alphabet` in the order given.

    `decode(encode(text)) == text` for every text over the alphabet. Encoding adds no special tokens. There is no
    unknown token: encoding a character outside the alphabet raises.

    Raises:
        ValueError: `alphabet` is empty or holds a character twice.
    """
    if not alphabet or len(set(alphabet)) != len(alphabet):
        raise ValueError(f"alphabet {alphabet!r} must be distinct characters, at least one")
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    # A plain dot would not match the newline.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
