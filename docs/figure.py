"""Draws the figure of the README from the two demo runs: `make figure`.

Domain specialization of every expert of one layer, for some languages, trained beside untrained.
All numbers come from `queries/domain_specialization.sql`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import altair as alt
import pandas as pd

from collector import open_run

LAYER = 4
LANGUAGES = {
    "eng_Latn": "English", "deu_Latn": "German", "nld_Latn": "Dutch", "fra_Latn": "French", "spa_Latn": "Spanish",
    "por_Latn": "Portuguese", "pol_Latn": "Polish", "ces_Latn": "Czech", "rus_Cyrl": "Russian", "ukr_Cyrl": "Ukrainian",
    "bul_Cyrl": "Bulgarian", "ell_Grek": "Greek", "arb_Arab": "Arabic", "pes_Arab": "Persian", "urd_Arab": "Urdu",
    "hin_Deva": "Hindi", "mar_Deva": "Marathi", "tha_Thai": "Thai", "kor_Hang": "Korean", "jpn_Jpan": "Japanese",
    "zho_Hani": "Chinese",
}  # fmt: skip


def specialization(run: str, weights: str) -> pd.DataFrame:
    """One row per language and expert of the layer."""
    rows = open_run(run).query("domain_specialization", layer=LAYER, labels=list(LANGUAGES)).df()
    return rows.assign(weights=weights, language=rows.label.map(LANGUAGES))


def main(out: Path) -> None:
    """Writes the figure."""
    rows = pd.concat([specialization("runs/demo", "trained"), specialization("runs/demo-random", "random weights")])
    # Experts stand in the order of the language that uses them most, so that shared experts line up.
    trained = rows[rows.weights == "trained"].pivot_table(index="expert", columns="language", values="value")
    order = list(LANGUAGES.values())
    best = trained[order].to_numpy().argmax(1)
    experts = [int(e) for e in sorted(trained.index, key=lambda e: (best[e], -trained.loc[e].max()))]
    chart = (
        alt.Chart(rows)
        .mark_rect()
        .encode(
            x=alt.X("expert:O", sort=experts, axis=alt.Axis(labels=False, ticks=False, title="64 experts")),
            y=alt.Y("language:N", sort=order, title=None),
            color=alt.Color("value:Q", scale=alt.Scale(scheme="viridis", domain=[0, 1]), title="share of tokens"),
            column=alt.Column("weights:N", sort=["trained", "random weights"], title=None),
        )
        .properties(width=380, height=300, title=f"Domain specialization, layer {LAYER} (baseline 0.125)")
        .configure_view(stroke=None)
    )
    chart.save(out)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/demo.png"))
