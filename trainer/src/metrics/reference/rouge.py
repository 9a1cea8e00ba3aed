"""Values for the tests of ../rouge.rs: python rouge.py > rouge_golden.json (pip install rouge-score)."""

import json
import sys

from rouge_score import rouge_scorer

KINDS = ["rouge1", "rouge2", "rougeL"]
scorer = rouge_scorer.RougeScorer(KINDS, use_stemmer=False)
cases = [
    ("the cat sat on the mat", ["the cat lay on the mat"]),
    ("police killed the gunman", ["the gunman police killed"]),
    ("A man, a plan: a canal!", ["a plan for a canal by a man"]),
    ("the the the", ["the cat"]),
    ("nothing in common", ["something else entirely different here"]),
    ("one", ["one"]),
    ("Don't stop 2 late", ["do not stop too late", "don't stop 2"]),
    ("", ["a reference"]),
    ("in 2015 sales rose by 3.5 %", ["sales rose 3.5 percent in 2015", "sales fell"]),
    ("naïve café", ["naive cafe", "na ve caf"]),
]
out = []
for candidate, references in cases:
    scores = [max(scorer.score(r, candidate)[k].fmeasure for r in references) for k in KINDS]
    out.append({"candidate": candidate, "references": references, "scores": scores})
json.dump(out, sys.stdout, ensure_ascii=False)
