"""A tokenizer with a vocabulary of four, for commands on tiny random models."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer's files into a model's folder."""
    words = {word: number for number, word in enumerate(["<unk>", "</s>", "one", "two"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
