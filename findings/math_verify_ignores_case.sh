#!/bin/sh
# math-verify takes a capital letter and a small one for the same variable: \frac{GM}{R} equals \frac{gm}{r}, and
# \Omega equals \omega.
#
# A good engineer would guess that they differ, because in mathematics and physics they are different symbols: M and
# m are often two masses of one problem, R and r two radii, \Omega and \omega two frequencies. Nothing in verify or
# parse says otherwise, and `strict=True`, whose text says that variables do matter, does not help. It hurts where
# answers are formulas (Minerva, OlympiadBench): a model that mixes up two quantities is rewarded.
#
# Exits 0 while this is so, and 1 once it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "math-verify==0.9.0" "latex2sympy2-extended==1.11.0" "sympy==1.14.0" \
    "antlr4-python3-runtime==4.13.2"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from math_verify import parse, verify

print("math-verify", version("math-verify"), "latex2sympy2-extended", version("latex2sympy2-extended"))
found = True
for gold, answer in ((r"\frac{GM}{R}", r"\frac{gm}{r}"), (r"\frac{m_1 - M}{r}", r"\frac{m_1 - m}{R}"), (r"2\Omega t", r"2\omega t")):
    verdict = verify(parse(f"${gold}$"), parse(f"${answer}$"), strict=True)
    print(f"gold {gold:20} answer {answer:20} {verdict}   read as {parse(f'${gold}$')[0]} and {parse(f'${answer}$')[0]}")
    found = found and verdict
print("as described" if found else "this has changed")
raise SystemExit(0 if found else 1)
PYTHON
