#!/usr/bin/env python3
"""Golden scores for lab/metrics.

rouge_l comes from rouge-score (rougeL, no stemmer) and the character similarity from rapidfuzz's fuzz.ratio; the others
are LongBench's definitions, written out here with Python's own regular expressions and Unicode tables.

    pip install rouge-score==0.1.2 rapidfuzz==3.10.1
    python tests/data/make/metrics.py tests/data/metrics
"""
import collections
import json
import random
import re
import string
import sys
from pathlib import Path

from rapidfuzz import fuzz
from rouge_score import rouge_scorer

ROUGE = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


def normal(text):
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def qa_f1(answer, expected):
    said, right = normal(answer), normal(expected)
    same = sum((collections.Counter(said) & collections.Counter(right)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(said), same / len(right)
    return 2 * precision * recall / (precision + recall)


def share(answer, wanted):
    found = re.findall("[0-9]+", answer)
    return found.count(wanted) / len(found) if found else 0.0


def retrieval(answer, expected):
    paragraph = re.search("Paragraph ([0-9]+)", expected)
    return share(answer, paragraph.group(1)) if paragraph else 0.0


def classification(answer, expected, classes):
    named = [c for c in classes if c in answer]
    for c in named:  # shortened while it is walked through, as in LongBench
        if c in expected and c != expected:
            named.remove(c)
    return 1 / len(named) if expected in named else 0.0


def code(answer, expected):
    line = next((x for x in answer.lstrip("\n").split("\n") if not any(m in x for m in ("`", "#", "//"))), "")
    return round(fuzz.ratio(line, expected)) / 100


CLASSES = ["Date", "City", "Other number", "number", "Number of something", "Person", "Title of a person", "Other location"]
WORDS = ("the a an The An cat sat. on; mat! don't naïve Élan 42 7 Paragraph ÜBER “the” 'a' x_y co-op 3.14 Straße — …the an- "
         "résumé 日本語 the_end A.B. the\u00a0lot İ").split(" ")


def cases():
    pick = random.Random(7)
    made = [("", ""), ("", "the"), ("the", "the"), ("The cat sat on the mat.", "a cat sat on a mat"), ("42", "42"),
            ("Paragraph 3, not Paragraph 13", "Paragraph 3"), ("3 3 4", "Paragraph 3"), ("no number", "Paragraph 3"),
            ("12 12 7", "12"), ("Number of something", "Number of something"), ("number, Other number", "Other number"),
            ("Title of a person Person", "Title of a person"), ("\n\n# note\nreturn x + 1\n", "return x + 2"), ("`a`\n", "a"),
            ("x = 1  // c\ny = 2", "y = 2"), ("only # comment", "x"), ("abc", "abc"), ("kitten", "sitting")]
    for _ in range(150):
        made.append(tuple(" ".join(pick.choice(WORDS) for _ in range(pick.randrange(12))) for _ in range(2)))
    for _ in range(40):
        made.append((", ".join(pick.sample(CLASSES, pick.randrange(5))), pick.choice(CLASSES)))
    for _ in range(40):
        line = "".join(pick.choice("abc =()+é") for _ in range(pick.randrange(1, 30)))
        other = "".join(c for c in line if pick.random() < 0.8) + pick.choice(["", "x", "\nmore"])
        made.append((other, line))
    return made


out = []
for answer, expected in cases():
    out.append({"answer": answer, "expected": expected, "qa_f1": qa_f1(answer, expected),
                "rouge_l": ROUGE.score(expected, answer)["rougeL"].fmeasure, "retrieval": retrieval(answer, expected),
                "count": share(answer, expected), "classification": classification(answer, expected, CLASSES),
                "code_similarity": code(answer, expected) if expected else 0.0})
path = Path(sys.argv[1]) / "golden.json"
path.parent.mkdir(parents=True, exist_ok=True)
lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in out)
path.write_text('{"classes": ' + json.dumps(CLASSES) + ',\n"cases": [\n' + lines + "\n]}\n")
