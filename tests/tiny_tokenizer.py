"""A tokenizer small enough to make in a test: one token a byte, beside Qwen's special tokens."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# ids of the 256 bytes are 0 to 255; the model configurations of the tests name these
SPECIAL_TOKENS = {
    "<|endoftext|>": 256,
    "<|im_start|>": 257,
    "<|im_end|>": 258,
    "<|vision_start|>": 259,
    "<|vision_end|>": 260,
    "<|image_pad|>": 261,
    "<|video_pad|>": 262,
}


def tiny_tokenizer(
    special_tokens: dict[str, int] = SPECIAL_TOKENS, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges, whose special tokens have the ids given."""
    # the byte-level alphabet names each byte by one printable character; sorting makes the ids reproducible
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)} | special_tokens
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def save_tiny_tokenizer(directory: str | Path, **kwargs) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `directory`."""
    tiny_tokenizer(**kwargs).save_pretrained(str(directory))
