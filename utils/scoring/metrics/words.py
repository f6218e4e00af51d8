"""What counts as a word: in ROUGE's default, which sees a to z and digits alone, and in any script."""

import unicodedata
from collections.abc import Iterable

import regex
from nltk.stem.porter import PorterStemmer
from rouge_score.tokenizers import Tokenizer

# Scripts written without spaces, of which a character, with its marks, is a word.
CHARACTERS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
WORD = regex.compile(rf"(?V1)[{CHARACTERS}&&[\p{{L}}\p{{N}}]]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--{CHARACTERS}]+")
SHORTEST_STEMMED = 4  # letters; rouge_score's


def split_words(text: str) -> list[str]:
    """Words in lower case, letters, marks and digits of any script; of Chinese, Japanese, Thai, Lao, Khmer and Burmese
    the characters.

    As Hu et al. (2015), LCSTS: A Large Scale Chinese Short Text Summarization Dataset, and after them multilingual
    ROUGE scripts such as MLROUGE (Wang et al., 2021). Of ASCII text the words are those of rouge_score.
    """
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


class UnicodeTokenizer(Tokenizer):
    """split_words for rouge_score; its stemmer is for English, so it stems words of a to z and digits alone."""

    def __init__(self, use_stemmer: bool):
        self.stem = PorterStemmer().stem if use_stemmer else None

    def tokenize(self, text: str) -> list[str]:
        return [
            self.stem(word) if self.stem and len(word) >= SHORTEST_STEMMED and word.isascii() else word
            for word in split_words(text)
        ]


def share_unseen(texts: Iterable[str]) -> float:
    """Share of the letters and digits, of any script, that rouge_score's default tokenizer drops."""
    num_seen = num_all = 0
    for text in texts:
        letters = regex.findall(r"[\p{L}\p{N}]", text.lower())
        num_all += len(letters)
        num_seen += sum(letter.isascii() for letter in letters)
    return 1 - num_seen / num_all if num_all else 0.0
