"""Labelled pairs for a rule book of another business: job ads for what people look for.

    from agrl_jax.data.bundled import jobs
    jobs.write_pairs("jobs.csv", rules)

The rule book has the steps `role` (same, related, other), `place` (here, remote, elsewhere, not asked) and `hours`
(as asked, other hours, unstated, not asked). Their values are true by construction; the tier follows from the table,
whatever it is.
"""

from __future__ import annotations

import csv
import os
import random

from agrl_jax.rulebook.book import RuleBook

# By trade, the roles as people call them, each with the names that ads use.
TRADES = {
    "care": {"nurse": ("Registered Nurse", "Staff Nurse RGN"), "carer": ("Care Assistant", "Support Worker")},
    "kitchen": {"cook": ("Chef de Partie", "Line Cook"), "kitchen porter": ("Dishwasher", "Kitchen Porter")},
    "roads": {"lorry driver": ("HGV Driver", "Class 1 Driver"), "courier": ("Van Driver", "Parcel Courier")},
    "ledgers": {"accountant": ("Chartered Accountant", "Financial Controller"), "bookkeeper": ("Accounts Clerk",)},
    "code": {"developer": ("Software Engineer", "Backend Developer"), "tester": ("QA Analyst", "Test Engineer")},
}
PLACES = ("Leeds", "York", "Cork", "Bristol", "Galway", "Dundee")
HOURS = ("full time", "part time", "nights")
EMPLOYERS = ("Brightwell", "Oakham & Co", "Northgate", "Saltmarsh", "Tern")


def write_pairs(path: str | os.PathLike, rules: RuleBook, count: int = 3000, seed: int = 0) -> None:
    """Writes `count` pairs as a CSV file that `data.path` takes."""
    dice = random.Random(seed)
    rows = [_pair(dice, rules) for _ in range(count)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _pair(dice: random.Random, rules: RuleBook) -> dict[str, str]:
    trade = dice.choice(list(TRADES))
    role = dice.choice(list(TRADES[trade]))
    place, hours = (dice.choice(options) if dice.random() < 0.5 else "" for options in (PLACES, HOURS))
    fit = dice.choices(("same", "related", "other"), (4, 2, 1))[0]
    near = [each for each in TRADES[trade] if each != role]
    far = [each for other, roles in TRADES.items() if other != trade for each in roles]
    offered = dice.choice({"same": [role], "related": near, "other": far}[fit])
    called = dice.choice([name for roles in TRADES.values() for name in roles.get(offered, ())])
    located = dice.choice([place or dice.choice(PLACES), dice.choice(PLACES), "remote"])
    worked = dice.choice([hours or dice.choice(HOURS), dice.choice(HOURS), ""])
    steps = {"role": fit, "place": _place(place, located), "hours": _hours(hours, worked)}
    values = [step.values.index(steps[step.name]) for step in rules.steps]
    return {
        "query": " ".join(filter(None, (hours, role, place and f"in {place}"))),
        "title": ", ".join(filter(None, (called, worked, located))),
        "brand": dice.choice(EMPLOYERS),
        "label": rules.tiers[rules.tier_for(values)].name,
        "family": " and ".join(name for name, asked in (("place", place), ("hours", hours)) if asked) or "plain",
        **{f"step_{name}": value for name, value in steps.items()},
    }


def _place(asked: str, located: str) -> str:
    if not asked:
        return "not asked"
    return {asked: "here", "remote": "remote"}.get(located, "elsewhere")


def _hours(asked: str, worked: str) -> str:
    if not asked:
        return "not asked"
    return {asked: "as asked", "": "unstated"}.get(worked, "other hours")
