#!/bin/sh
# math-verify reads two integers that stand side by side as a sum: 2(3) is 5, and (2)(3) is 5.
#
# A good engineer would guess 6, because LaTeX without a sign between two factors means a product, and because
# math-verify itself reads 2(x) as a product. The rule behind it is for mixed numbers such as 3\frac12, and it also
# takes integers. It hurts where math-verify gives the reward or the score: a model that answers 2(3) to a question
# whose answer is 6 is marked wrong, and one whose answer should be 5 is marked right. The parser's option
# interpret_as_mixed_fractions=False, which is documented to switch mixed numbers off, changes nothing.
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

from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import parse, verify

print("math-verify", version("math-verify"), "latex2sympy2-extended", version("latex2sympy2-extended"))
found = True
for text in (r"2(3)", r"(2)(3)"):
    five, six = (verify(parse(f"${number}$"), parse(f"${text}$")) for number in (5, 6))
    print(f"{text:8} reads as {parse(f'${text}$')[0]}; verify with gold 5: {five}, with gold 6: {six}")
    found = found and five and not six
print("2(x)     reads as", parse("$2(x)$")[0])
off = latex2sympy("2(3)", conversion_config=ConversionConfig(interpret_as_mixed_fractions=False))
print("2(3)     with interpret_as_mixed_fractions=False reads as", off)
found = found and off == 5
print("as described" if found else "this has changed")
raise SystemExit(0 if found else 1)
PYTHON
