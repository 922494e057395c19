"""Vocabulary and item descriptions of the simulated shop.

Everything that people in that shop care about can be read in an item's title, description,
category, brand or price, so that a reader of the text can know what a new item is like.
"""

from __future__ import annotations

import numpy as np
import polars as pl

DEPARTMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], float]] = {
    "Lighting": (
        ("desk lamp", "floor lamp", "pendant light"),
        ("oak", "brass", "paper", "blown glass", "spun steel"),
        90.0,
    ),
    "Seating": (
        ("armchair", "bar stool", "rocking chair"),
        ("walnut", "rattan", "bouclé", "moulded plywood", "velvet"),
        240.0,
    ),
    "Tableware": (
        ("teapot", "serving bowl", "espresso cup"),
        ("stoneware", "porcelain", "enamel", "terracotta", "pressed glass"),
        32.0,
    ),
    "Kitchen": (
        ("chef's knife", "skillet", "pepper mill"),
        ("carbon steel", "cast iron", "copper", "beech", "marble"),
        65.0,
    ),
    "Bags": (
        ("backpack", "weekend bag", "messenger bag"),
        ("leather", "waxed canvas", "recycled nylon", "felted wool", "cork"),
        120.0,
    ),
    "Stationery": (
        ("notebook", "fountain pen", "desk tray"),
        ("linen", "resin", "cherry wood", "aluminium", "handmade paper"),
        28.0,
    ),
    "Textiles": (
        ("throw blanket", "cushion cover", "bath towel"),
        ("merino", "organic cotton", "alpaca", "hemp", "silk"),
        55.0,
    ),
    "Garden": (
        ("planter", "watering can", "lantern"),
        ("zinc", "teak", "concrete", "woven willow", "glazed clay"),
        48.0,
    ),
}
"""Department → kinds of things, materials they are made of, typical price."""
STYLES = (
    "Nordic",
    "industrial",
    "rustic",
    "art deco",
    "minimalist",
    "bohemian",
    "mid-century",
    "farmhouse",
)
FINISHES = (
    "matte black",
    "sage green",
    "brushed gold",
    "chalk white",
    "brick red",
    "midnight blue",
    "mustard yellow",
    "natural",
    "dusty pink",
    "smoke grey",
)
BRANDS = (
    "Aldermoor",
    "Brackenhay",
    "Corvale",
    "Dunmarrow",
    "Elmsward",
    "Fennholt",
    "Gorseby",
    "Harrowlind",
    "Ivelstone",
    "Jorvane",
    "Kelmarsh Row",
    "Lindquay",
    "Morwick",
    "Northfold",
    "Oxbarrow",
    "Pellwood",
)
FLAWS = ("", "ex-display", "sold as seen", "with small marks", "self-assembly", "reworked")
"""What many cannot stand, wherever it is; the first is none."""
BANDS = ("budget", "everyday", "refined", "premium")
"""Quarters of the price of things of one kind."""
DEVICES = ("phone", "desktop", "tablet")

KINDS = tuple(kind for kinds, _, _ in DEPARTMENTS.values() for kind in kinds)
MATERIALS = tuple(material for _, materials, _ in DEPARTMENTS.values() for material in materials)
DEPARTMENT_OF_KIND = np.repeat(np.arange(len(DEPARTMENTS)), 3)
"""(24,) number of the department that each kind stands in; three kinds a department."""
MATERIALS_EACH = 5
PRICE_OF_DEPARTMENT = np.array([price for _, _, price in DEPARTMENTS.values()])

TITLES = (
    "{material} {kind}, {finish}",
    "{finish} {kind} in {material}",
    "{style} {kind}, {finish} {material}",
    "{brand} {kind} in {finish} {material}",
    "{style} {material} {kind} in {finish}",
)
OPENINGS = (
    "{A_style} {kind} by {brand}, made of {material} and finished in {finish}.",
    "{brand} makes this {style} {kind} of {material}; the finish is {finish}.",
    "{kind} in {material}, {finish}, from the {style} line of {brand}.",
    "From {brand}: {a_style} {kind} with a {finish} finish, worked in {material}.",
)
CLOSINGS = (
    "{A_band} choice for the {department} shelf.",
    "Part of our {band} {department} range.",
    "{A_band} piece that is easy to care for.",
    "",
)


def write_items(
    kind: np.ndarray,
    material: np.ndarray,
    style: np.ndarray,
    finish: np.ndarray,
    brand: np.ndarray,
    band: np.ndarray,
    flaw: np.ndarray,
    wording: np.ndarray,
) -> pl.DataFrame:
    """Titles and descriptions of N items.

    Args:
        kind, material, style, finish, brand, band, flaw: (N,) numbers of the words above.
        wording: (N, 3) any integers; choose the form of title, opening and closing.

    Returns:
        N rows of title, description, category ("Department|kind") and brand.
    """
    words = pl.DataFrame(
        {
            "kind": _words(KINDS, kind),
            "material": _words(MATERIALS, material),
            "style": _words(STYLES, style),
            "finish": _words(FINISHES, finish),
            "brand": _words(BRANDS, brand),
            "band": _words(BANDS, band),
            "flaw": _words(FLAWS, flaw),
            "category": _words(tuple(DEPARTMENTS), DEPARTMENT_OF_KIND[kind]),
            "department": _words([n.lower() for n in DEPARTMENTS], DEPARTMENT_OF_KIND[kind]),
            "title_form": wording[:, 0] % len(TITLES),
            "opening_form": wording[:, 1] % len(OPENINGS),
            "closing_form": wording[:, 2] % len(CLOSINGS),
        }
    )
    for name in ("style", "band"):
        vowel = pl.col(name).str.to_lowercase().str.contains("^[aeiou]")
        article = pl.when(vowel).then(pl.lit("an ")).otherwise(pl.lit("a ")) + pl.col(name)
        words = words.with_columns(article.alias(f"a_{name}"))
        words = words.with_columns(_capital(pl.col(f"a_{name}")).alias(f"A_{name}"))
    flawed = pl.col("flaw") != ""
    mark = pl.when(flawed).then(pl.format(" ({})", "flaw")).otherwise(pl.lit(""))
    description = _fill(OPENINGS, "opening_form") + " " + _fill(CLOSINGS, "closing_form")
    return words.select(
        title=_capital(_fill(TITLES, "title_form")) + mark,
        description=_capital(description.str.strip_chars()),
        category=pl.col("category") + "|" + pl.col("kind"),
        brand="brand",
    )


def numbered(letter: str, count: int, digits: int) -> list[str]:
    """Ids like u0007: a letter and a row, of equal width."""
    width = max(digits, len(str(max(0, count - 1))))
    return [f"{letter}{row:0{width}d}" for row in range(count)]


def _words(names: tuple[str, ...] | list[str], codes: np.ndarray) -> pl.Series:
    return pl.Series(list(names), dtype=pl.String).gather(codes.astype(np.int64))


def _capital(text: pl.Expr) -> pl.Expr:
    return text.str.head(1).str.to_uppercase() + text.str.slice(1)


def _fill(forms: tuple[str, ...], chosen: str) -> pl.Expr:
    """The form that each row chose, its blanks filled from the columns of their names."""
    blanks: tuple[str, ...] = ("kind", "material", "style", "finish", "brand", "band", "department")
    blanks += ("a_style", "A_style", "A_band")
    text = pl.lit("")
    for number, form in enumerate(forms):
        names = [name for name in blanks if "{" + name + "}" in form]
        names = [name for _, name in sorted((form.index("{" + n + "}"), n) for n in names)]
        plain = form
        for name in names:
            plain = plain.replace("{" + name + "}", "{}")
        filled = pl.format(plain, *names) if names else pl.lit(form)
        text = pl.when(pl.col(chosen) == number).then(filled).otherwise(text)
    return text
