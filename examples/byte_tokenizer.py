"""Write the byte tokens of prepare_bytes.py as a Hugging Face tokenizer, for programs that read a converted model.

    python examples/byte_tokenizer.py quickstart/checkpoints/tokenizer

Token n is the byte n, and token 256 is the end of a document. `python -m hgrn2_megatron convert` copies the folder
`tokenizer` of a checkpoint.
"""

import sys
from pathlib import Path

from prepare_bytes import END_OF_DOCUMENT
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def write(folder: Path):
    """Write tokenizer.json, tokenizer_config.json and generation_config.json, which names the end token."""
    # the vocabulary has no characters, so each character falls back to its bytes
    tokenizer = Tokenizer(BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_DOCUMENT
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    GenerationConfig(bos_token_id=END_OF_DOCUMENT, eos_token_id=END_OF_DOCUMENT).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
