"""A T5 of 1.3 million parameters and its tokenizer, shaped like Flan-T5: gated GELU, an lm_head of its own."""

import re
import string
from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

# A speaker, a word (with its apostrophe unless it is a genitive), the genitive, a mark.
_PIECE = re.compile(r"#\w+#|\w+(?:'(?!s\b)\w+)?|'s\b|[^\w\s]")


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one piece for each word of the texts, and single characters for any other text."""
    pieces = set()
    for text in texts:
        for match in _PIECE.finditer(text):
            starts_word = match.start() == 0 or text[match.start() - 1].isspace()
            pieces.add("▁" * starts_word + match.group())
    characters = {"▁", *string.printable.strip()} - pieces
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, -2.0) for piece in sorted(pieces)] + [(piece, -12.0) for piece in sorted(characters)]

    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    # Like T5's, it makes one space of any white space, newlines too.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=1024
    )


def build_model(vocab_size: int, seed: int) -> T5ForConditionalGeneration:
    """Return a model whose weights are drawn so that it learns to copy words from a dialogue within minutes."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocab_size,
        d_model=128,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=3,
        num_decoder_layers=3,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,  # in transformers 5 this turns off the scaling that goes with a tied head ...
    )
    model = T5ForConditionalGeneration(config)
    model.config.tie_word_embeddings = False  # ... but leaves the config saying True; encoder and decoder share theirs
    with torch.no_grad():
        # A head that starts as the embedding finds the word that attention brings; it is trained apart from then on.
        model.lm_head.weight = torch.nn.Parameter(model.shared.weight * config.d_model**-0.5)
        for name, parameter in model.named_parameters():
            if name.endswith(("q.weight", "k.weight")):
                # T5 draws q far smaller than k, too small for one learning rate to suit both. The product is the same.
                parameter.normal_(0.0, (config.d_model * config.d_kv**0.5) ** -0.5)
        for stack in (model.encoder, model.decoder):
            _prefer_near_words(stack.block[0].layer[0].SelfAttention)
    return model


def _prefer_near_words(attention: torch.nn.Module) -> None:
    """Let three of four heads start with a look at the word before, the word after (or two before), and all before."""
    is_encoder = not attention.is_decoder
    offsets = torch.arange(-100, 101)
    buckets = attention._relative_position_bucket(offsets, is_encoder, 32, 64)
    for bucket in buckets.unique().tolist():
        offset = min(offsets[buckets == bucket].tolist(), key=abs)
        bias = attention.relative_attention_bias.weight[bucket]
        bias[0] -= min(abs(offset + 1), 6)
        bias[1] -= min(abs(offset - 1 if is_encoder else offset + 2), 6)
        bias[2] -= 0.3 * min(-offset, 20) if offset <= 0 else 6
