"""Samples token by token as HTML, from what ``token_log`` records. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def token_html(sample: Mapping[str, Any], index: int) -> str:
    """One token as a span: colour by R, a frame around outliers, an underline under the teacher's tokens."""
    text, region = sample["text"][index], sample["region"][index]
    details, style, classes = [region], "", ["t"]
    if "reward" in sample:
        reward, trust = sample["reward"][index], sample["p_trust"][index]
        strength = min(1.0, abs(reward) / 5) * 0.6
        style = f"background:rgba({'214,39,40' if reward < 0 else '31,119,180'},{strength:.2f})"
        details.append(f"R = {reward:.2f} nats, P_trust = {trust:.3f}")
    if region == "guidance":
        classes.append("g")
    elif sample["outlier"][index] > 0:
        classes.append("o")
        details.append("outlier")
    shown = escape(text).replace("\n", "\u21b5<br>").replace(" ", "\u00a0" if text.isspace() else " ")
    return f'<span class="{" ".join(classes)}" style="{style}" title="{escape("; ".join(details))}">{shown}</span>'


def sample_html(sample: Mapping[str, Any]) -> str:
    """A whole sample: prompt, tokens, reference answer."""
    tokens = "".join(token_html(sample, index) for index in range(len(sample["text"])))
    ending = "" if sample["finished"] else ' <span class="n">(cut off by the budget)</span>'
    answer = f'<div class="n">reference: {escape(sample["answer"])}</div>' if sample["answer"] else ""
    return f'<div class="s"><div class="n">{escape(sample["prompt"])}</div>{tokens}{ending}{answer}</div>'


def unlikely_html(samples: Sequence[Mapping[str, Any]], count: int = 8, context: int = 25) -> str:
    """The student's tokens with the lowest R, whatever the gate made of them, each in its context."""
    places = [
        (sample["reward"][index], sample, index)
        for sample in samples
        for index, region in enumerate(sample["region"] if "reward" in sample else [])
        if region == "on-policy"
    ]
    rows = []
    for reward, sample, index in sorted(places, key=lambda place: place[0])[:count]:
        around = range(max(0, index - context), min(len(sample["text"]), index + context + 1))
        # A short answer says little without its question.
        before = escape(sample["prompt"][-60:]) if around.start == 0 else "\u2026"
        cells = "".join(f"<b>{token_html(sample, i)}</b>" if i == index else token_html(sample, i) for i in around)
        rows.append(f'<tr><td>{reward:.2f}</td><td><span class="n">{before}</span>{cells}</td></tr>')
    return (
        f"<table><tr><th>R</th><th>token in context</th></tr>{''.join(rows)}</table>"
        if rows
        else "<p>The student wrote none of these samples.</p>"
    )


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100% } .n { color: #777 } .s { margin: .8em 0; padding: .5em .8em; border: 1px solid #ddd }
.t { font-family: ui-monospace, monospace; white-space: pre-wrap; padding: 1px 0 }
.t { margin-right: 1px } .g { border-bottom: 2px solid #2a2 }
.o { outline: 1.5px solid #a00; outline-offset: -1px } td { padding: 2px 10px 2px 0; vertical-align: top }
th { text-align: left; padding-right: 10px } summary { cursor: pointer; font-weight: 600 }
"""
LEGEND = (
    '<p>Each token is a box; point at one for its numbers. <span class="t" style="background:rgba(214,39,40,.6)">red'
    '</span>: the teacher finds it less likely than the student does (R &lt; 0), <span class="t" style="background:'
    'rgba(31,119,180,.6)">blue</span>: more likely; full colour from 5 nats. <span class="t o">Framed</span>: an '
    'outlier, a token the trust gate did not accept. <span class="t g">Underlined</span>: written by the teacher '
    "(guidance).</p>"
)
