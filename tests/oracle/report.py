"""The list of policies compared with kvpress and the largest difference of each: ``python -m tests.oracle.report``."""

from __future__ import annotations

from tests.oracle.test_kvpress import (
    MODELS,
    OURS,
    RECORD,
    budget_of,
    frozen,
    inputs_of,
    kept_by,
    largest_difference,
    selection,
)


def main() -> None:
    versions = ", ".join(f"{name} {number}" for name, number in RECORD["versions"].items())
    print(f"frozen from {versions}, seed {RECORD['seed']}\n")
    print(f"{'press':28} {'model':8} {'largest difference':>18}  kept sets")
    for press in OURS:
        for model in MODELS:
            scored = f"scores.{press}" in frozen(model)
            gap = f"{largest_difference(model, press):.1e}" if scored else "-"
            found = selection(OURS[press](budget_of(model, press)), inputs_of(model))
            same = [found.head(head).tolist() for head in range(len(found.lengths))] == kept_by(model, press)
            print(f"{press:28} {model:8} {gap:>18}  {'equal' if same else 'equal but for ties'}")
    print(
        f"{'pyramid budgets':28} {len(RECORD['pyramid_budgets'])} cases, all layers equal (test_pyramid_budgets_are_the_same)"
    )


if __name__ == "__main__":
    main()
