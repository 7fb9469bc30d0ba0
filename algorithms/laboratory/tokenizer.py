"""The laboratory's tokenizer: one token for every word of the invented language, with a chat template."""

from collections.abc import Sequence
from typing import Any

BEGIN, USER, ASSISTANT, END, PADDING, UNKNOWN = (
    "<|begin|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|pad|>",
    "<|unknown|>",
)
SPECIAL_TOKENS = (PADDING, UNKNOWN, BEGIN, USER, ASSISTANT, END)

CHAT_TEMPLATE = (
    f"{BEGIN}"
    "{% for message in messages %}"
    f"{{% if message['role'] == 'assistant' %}} {ASSISTANT} {{% else %}} {USER} {{% endif %}}"
    f"{{{{ message['content'] }}}} {END}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}} {ASSISTANT} {{% endif %}}"
)


def word_tokenizer(words: Sequence[str]) -> Any:
    """A fast transformers tokenizer whose vocabulary is the special tokens and these words, in this order."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PADDING,
        unk_token=UNKNOWN,
        extra_special_tokens=[USER, ASSISTANT],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
