"""A tokenizer of four words, for commands on tiny random models."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


def write_tokenizer(folder: Path) -> None:
    """Put the tokenizer's files beside a model's."""
    words = {word: number for number, word in enumerate(["<unk>", "</s>", "one", "two"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
