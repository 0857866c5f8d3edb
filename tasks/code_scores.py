"""Scores of generated Python code, which is parsed but never executed."""

import ast
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Sized
from textwrap import dedent
from typing import Any

import numpy as np

from tasks.scores import Metric, TextPrediction

FENCED = re.compile(
    r"```[^\n`]*\n(.*?)(?:^[ \t]*```|```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
CLOSED = re.compile(r"\A([^`]*\S)\s*```\s*\Z")  # code whose opening fence is missing
RESAMPLES = 1000  # of the bootstrap
METRICS = {
    "perplexity": Metric("perplexity"), "bleu": Metric("BLEU", digits=1),
    "chrf": Metric("chrF", digits=1), "rouge_l": Metric("ROUGE-L", digits=3),
    "exact_match": Metric("exact match, %", 100, 1), "parses": Metric("parse, %", 100, 1),
    "ended": Metric("ended by itself, %", 100, 1), "tokens": Metric("tokens", digits=0),
}


def strip_fences(answer: str) -> str:
    """Return the code between the fences of `answer`, or all of it where there are none.

    Joins several fenced blocks. The last may be cut off before its closing fence; a closing fence
    without an opening one ends the code before it.
    """
    if closed := CLOSED.match(answer):
        return closed[1].strip("\n")
    blocks = FENCED.findall(answer)
    return "\n".join(dedent(block).rstrip() for block in blocks) if blocks else answer.strip()


def parse(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # code with odd escapes parses, with a warning
            return ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def parses(code: str) -> bool:
    """Return whether `code` is at least one statement of this interpreter's Python."""
    module = parse(code)
    return bool(module and module.body)


def imported(code: str) -> set[str]:
    """Return the top-level modules that `code` imports."""
    names = set()
    for node in ast.walk(parse(code) or ast.Module([], [])):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def rouge_l(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return each pair's F-measure of the longest common subsequence of words (Lin, 2004)."""
    from rouge_score.rouge_scorer import RougeScorer  # slow to import

    scorer = RougeScorer(["rougeL"])
    return [scorer.score(reference, answer)["rougeL"].fmeasure
            for reference, answer in zip(references, answers, strict=True)]


def tell(prediction: TextPrediction) -> list[str]:
    """Return an answer's code, and a line on its length and form."""
    code = strip_fences(prediction.generated)
    return [code, f"({prediction.tokens} tokens{'' if prediction.ended else ', cut off'}; "
                  f"{'parses' if parses(code) else 'does not parse'} as Python)"]


def summarize(
    outputs: Sequence[str], predictions: Sequence[TextPrediction], tokens_of: Callable[[str], Sized]
) -> dict[str, Any]:
    """Compare generated code with the right code; return scores with 95 % intervals.

    `perplexity` and `loss` (nats a token) are of the right answers. sacrebleu computes BLEU
    (Papineni et al., 2002) and chrF (Popović, 2015) over the corpus, in percent; the others are
    means. `tokens` counts whole answers with their fences. The intervals come from the bootstrap
    over the examples: percentiles, or sacrebleu's mean ± half their distance.
    """
    references = [strip_fences(output) for output in outputs]
    answers = [strip_fences(prediction.generated) for prediction in predictions]
    nats = np.array([prediction.reference_nats for prediction in predictions])
    tokens = np.array([prediction.reference_tokens for prediction in predictions])
    means = {
        "rouge_l": rouge_l(references, answers),
        "exact_match": [same(*pair) for pair in zip(references, answers, strict=True)],
        "parses": [parses(code) for code in answers],
        "references_parse": [parses(code) for code in references],
        "ended": [prediction.ended for prediction in predictions],
        "tokens": [prediction.tokens for prediction in predictions],
    }
    results: dict[str, Any] = {"n": len(outputs), "loss": float(nats.sum() / tokens.sum())}
    results["perplexity"] = math.exp(min(results["loss"], 700.0))
    intervals = {"perplexity": bootstrap(
        len(outputs), lambda chosen: np.exp(nats[chosen].sum(-1) / tokens[chosen].sum(-1)))}
    for name, (score, interval) in corpus_scores(references, answers).items():
        results[name], intervals[name] = score, interval
    for name, values in means.items():
        array = np.array(values, dtype=float)
        results[name] = float(array.mean())
        intervals[name] = bootstrap(len(outputs), lambda chosen, a=array: a[chosen].mean(-1))
    lengths = [len(tokens_of(output)) for output in outputs]
    return results | {"reference_tokens": float(np.mean(lengths)), "interval_95": intervals}


def same(code: str, other: str) -> bool:
    """Return whether two answers are equal but for white space at their ends and those of lines."""
    mine, theirs = ("\n".join(line.rstrip() for line in text.splitlines()).strip("\n")
                    for text in (code, other))
    return mine == theirs


def bootstrap(n: int, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """Return the 95 % percentile interval of a statistic of `n` examples (Efron, 1979).

    `statistic` takes indices (resamples, n) and returns a value for each resample.
    """
    chosen = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    low, high = np.percentile(statistic(chosen), (2.5, 97.5))
    return float(low), float(high)


def corpus_scores(
    references: Sequence[str], answers: Sequence[str]
) -> dict[str, tuple[float, tuple[float, float]]]:
    """Return BLEU and chrF, each with sacrebleu's bootstrap interval."""
    from sacrebleu.metrics import BLEU, CHRF  # slow to import
    from sacrebleu.significance import PairedTest

    # With one system the test compares nothing but gives intervals. `corpus_score(n_bootstrap=...)`
    # fails where some resampled scores are exactly zero, as an untrained model's are.
    metrics = {"bleu": BLEU(force=True), "chrf": CHRF()}
    test = PairedTest([("answers", answers)], metrics, [references], "bs", RESAMPLES)
    _, found = test()
    results = [column[0] for name, column in found.items() if name != "System"]
    return {name: (float(result.score), (max(0.0, float(result.mean - result.ci)),
                                         min(100.0, float(result.mean + result.ci))))
            for name, result in zip(metrics, results, strict=True)}


def describe(results: Mapping[str, Any]) -> str:
    low, high = results["interval_95"]["perplexity"]
    return (
        f"perplexity {results['perplexity']:.2f} (95 % interval {low:.2f} to {high:.2f}, "
        f"n={results['n']}), BLEU {results['bleu']:.1f}, chrF {results['chrf']:.1f}, ROUGE-L "
        f"{results['rouge_l']:.3f}, exact {results['exact_match']:.1%}, {results['parses']:.1%} "
        f"parse (of the right answers {results['references_parse']:.1%}), {results['tokens']:.0f} "
        f"tokens (right answers {results['reference_tokens']:.0f})"
    )


def explain_references(results: Mapping[str, Any]) -> str:
    return (f"Of the {results['n']} right answers {results['references_parse']:.1%} parse; they "
            f"have {results['reference_tokens']:.0f} tokens on average. Perplexity is of the right "
            "answers, every other score of the generated ones.")


def columns(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of a table that show the results of one checkpoint, by title."""
    low, high = results["interval_95"]["perplexity"]
    return {
        "perplexity": f"{results['perplexity']:.2f}", "95 % interval": f"{low:.2f} to {high:.2f}",
        "BLEU": f"{results['bleu']:.1f}", "chrF": f"{results['chrf']:.1f}",
        "ROUGE-L": f"{results['rouge_l']:.3f}", "exact": f"{results['exact_match']:.1%}",
        "parse": f"{results['parses']:.1%}", "tokens": f"{results['tokens']:.0f}",
    }


def facts(outputs: Sequence[str]) -> dict[str, str]:
    """Return the shares of fenced and of parsing answers, and the ten most imported modules."""
    answers = [strip_fences(output) for output in outputs]
    modules = Counter(name for code in answers for name in imported(code))
    return {
        "fenced": f"{np.mean(['```' in output for output in outputs]):.1%}",
        "parse": f"{np.mean([parses(code) for code in answers]):.1%}",
        "imports": ", ".join(f"{name} {count}" for name, count in modules.most_common(10)),
    }
