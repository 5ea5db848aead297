"""Reads real sentences in 60 languages from the installed package `eld` 1.0.6.

The text is the accuracy benchmark that the package ships (`eld/tests/data/big-test.txt`, one
`iso639-1<TAB>sentence` per line, 60 languages x 1000 sentences); this package contains no copy.
Labels are FLORES-200 codes. Some languages of the corpus need care:

- `zh` mixes simplified and traditional characters, so its label is `zho_Hani` (either script);
- `no` mixes Bokmål and Nynorsk, so its label is the macrolanguage's, `nor_Latn`;
- `ku` is Sorani in Arabic letters (`ckb_Arab`), not Kurmanji;
- `lo` holds single words rather than sentences (12 bytes on average).

Every tenth sentence of a language is held out: the demo model was not trained on it, and the demo
run collects exactly those.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

SPLITS = ("heldout", "train", "all")
Split = Literal["heldout", "train", "all"]
HELDOUT_EVERY = 10
SOURCE = "eld-1.0.6"

LABEL_OF_ISO = {
    "am": "amh_Ethi", "ar": "arb_Arab", "az": "azj_Latn", "be": "bel_Cyrl", "bg": "bul_Cyrl",
    "bn": "ben_Beng", "ca": "cat_Latn", "cs": "ces_Latn", "da": "dan_Latn", "de": "deu_Latn",
    "el": "ell_Grek", "en": "eng_Latn", "es": "spa_Latn", "et": "est_Latn", "eu": "eus_Latn",
    "fa": "pes_Arab", "fi": "fin_Latn", "fr": "fra_Latn", "gu": "guj_Gujr", "he": "heb_Hebr",
    "hi": "hin_Deva", "hr": "hrv_Latn", "hu": "hun_Latn", "hy": "hye_Armn", "is": "isl_Latn",
    "it": "ita_Latn", "ja": "jpn_Jpan", "ka": "kat_Geor", "kn": "kan_Knda", "ko": "kor_Hang",
    "ku": "ckb_Arab", "lo": "lao_Laoo", "lt": "lit_Latn", "lv": "lvs_Latn", "ml": "mal_Mlym",
    "mr": "mar_Deva", "ms": "zsm_Latn", "nl": "nld_Latn", "no": "nor_Latn", "or": "ory_Orya",
    "pa": "pan_Guru", "pl": "pol_Latn", "pt": "por_Latn", "ro": "ron_Latn", "ru": "rus_Cyrl",
    "sk": "slk_Latn", "sl": "slv_Latn", "sq": "als_Latn", "sr": "srp_Cyrl", "sv": "swe_Latn",
    "ta": "tam_Taml", "te": "tel_Telu", "th": "tha_Thai", "tl": "tgl_Latn", "tr": "tur_Latn",
    "uk": "ukr_Cyrl", "ur": "urd_Arab", "vi": "vie_Latn", "yo": "yor_Latn", "zh": "zho_Hani",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sentence:
    """One line of the corpus."""

    iso: str
    """Language code in the file (ISO 639-1)."""
    index: int
    """Position among the sentences of that language, from 0."""
    text: str

    @property
    def heldout(self) -> bool:
        """Whether the sentence was held out from training the demo model."""
        return self.index % HELDOUT_EVERY == HELDOUT_EVERY - 1

    @property
    def label(self) -> str:
        """The language as a FLORES-200 code."""
        return LABEL_OF_ISO[self.iso]


def corpus_path() -> Path:
    """Returns the path of the text in the installed package.

    Raises:
        FileNotFoundError: the package `eld` is missing or ships no such file.
    """
    # find_spec does not import the package, which would load a large language-detection model.
    spec = importlib.util.find_spec("eld")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "tests" / "data" / "big-test.txt"
        if path.is_file():
            return path
    raise FileNotFoundError(
        "the embedded corpus needs the package eld 1.0.6: pip install 'moe-routing-collector[demo]'"
    )


def read_sentences(split: Split = "heldout") -> Iterator[Sentence]:
    """Yields the sentences of a split in file order: language by language, by index."""
    index_of: dict[str, int] = {}
    with corpus_path().open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            iso, _, text = line.rstrip("\r\n").partition("\t")
            index = index_of.get(iso, 0)
            index_of[iso] = index + 1
            sentence = Sentence(iso=iso, index=index, text=text)
            if split == "all" or sentence.heldout == (split == "heldout"):
                yield sentence
