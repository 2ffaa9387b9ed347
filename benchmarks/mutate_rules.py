"""Is every condition of the table of operations seen by a test?

Takes the conditions away one at a time, in a copy of the repository, and runs the tests that are
to see it. A mutation that survives is a condition that no test needs.

    python benchmarks/mutate_rules.py [--only WORD] [--tests FILE ...]

Tests that fail without a mutation are left out. It exits with 1 if a mutation survives, or no
longer applies since the code has changed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONSTANTS, RULES = "graph/constants.py", "graph/rules.py"
FEATURES, MOVING, FLOW = "graph/features.py", "graph/moving.py", "graph/dataflow.py"
TESTS = ["tests/graph", "tests/pruning/test_every_size.py"]


@dataclass(frozen=True)
class Mutation:
    """In `file`, `old` becomes `new`; the tests that `seen_by` selects (pytest's -k) fail then."""

    name: str
    file: str
    old: str
    new: str
    seen_by: str


MUTATIONS = [
    # What is constant.
    Mutation(
        "only finite numbers are known",
        CONSTANTS,
        "mask = mask & value.isfinite()",
        "mask = mask",
        "finite_numbers",
    ),
    Mutation(
        "features with one label have one value",
        CONSTANTS,
        "mask = (low == high)[there + 1]",
        "mask = (low <= high)[there + 1]",
        "passes_by_labels",
    ),
    Mutation(
        "a label without features says nothing",
        CONSTANTS,
        "[there + 1] & (there >= 0)",
        "[there + 1]",
        "passes_by_labels",
    ),
    Mutation(
        "one unknown feature of a label is enough",
        CONSTANTS,
        "value = self.value.masked_fill(~self.mask, torch.nan)",
        "value = self.value",
        "passes_by_labels",
    ),
    Mutation(
        "several sources have one value",
        CONSTANTS,
        "agrees = passed.mask & (passed.value == known.value) & known.mask",
        "agrees = passed.mask & known.mask",
        "stacked_apart or in_the_batch",
    ),
    Mutation(
        "several sources are all known",
        CONSTANTS,
        "agrees = passed.mask & (passed.value == known.value) & known.mask",
        "agrees = (passed.value == known.value)",
        "with_others or stacked",
    ),
    Mutation(
        "sums keep zeros only",
        CONSTANTS,
        "return None if known is None else Known(known.zero, torch.zeros_like(known.value))",
        "return known",
        "sequences and (sum or cumulative_sum or product or norm)",
    ),
    *(
        Mutation(
            f"{name} keeps zeros only",
            RULES,
            f"{entry}, zeros_from_related)",
            f"{entry}, from_related)",
            seen_by,
        )
        for name, entry, seen_by in (
            (
                "prod",
                "aten.prod.dim_int: Rule(_all_but(_dims_argument(1))",
                "sequences and product",
            ),
            ("sum", "aten.sum.dim_IntList: Rule(_summing(1)", "test_sequences and sum"),
            (
                "norm",
                "aten.linalg_vector_norm.default: Rule(_summing(2)",
                "test_sequences and norm",
            ),
            ("cumsum", "aten.cumsum.default: Rule(_all_but(_dim_argument(1))", "cumulative_sum"),
        )
    ),
    Mutation(
        "rms_norm keeps zeros only",
        RULES,
        "aten.rms_norm.default: Rule(_all_but(_normalised), zeros_from_any(0)",
        "aten.rms_norm.default: Rule(_all_but(_normalised), from_related",
        "rms_norm",
    ),
    Mutation(
        "sum of everything keeps zeros only",
        RULES,
        "aten.sum.default: Rule(_summing(1), zeros_from_related)",
        "aten.sum.default: Rule(_summing(1), from_related)",
        "all_at_once",
    ),
    *(
        Mutation(
            f"nothing is known behind {name}",
            RULES,
            old,
            old.replace("(1))),", "(1)), from_related),").replace("(1)))", "(1)), from_related)"),
            seen_by,
        )
        for name, old, seen_by in (
            (
                "softmax",
                "*(aten.log_softmax.int, aten._log_softmax.default),\n        ),\n"
                "        Rule(_all_but(_dim_argument(1))),",
                "softmax_over",
            ),
            (
                "var and logsumexp",
                "(aten.var.correction, aten.logsumexp.default, aten.mean.default),\n"
                "        Rule(_all_but(_dims_argument(1))),",
                "variance or logsumexp",
            ),
        )
    ),
    Mutation(
        "nothing is known behind group_norm",
        RULES,
        "aten.group_norm.default: Rule(_all_but(lambda operation, rank: range(1, rank)))",
        "aten.group_norm.default: Rule(_all_but(lambda operation, rank: range(2, rank)), "
        "from_related)",
        "group_norm",
    ),
    Mutation(
        "a product has zeros only where a factor does",
        CONSTANTS,
        "found = facts.at(place).passed(labels, there).zero\n",
        "found = facts.at(place).passed(labels, there).mask\n",
        "mixes_other_dims and (products or attention) or einsum_over",
    ),
    Mutation(
        "attention takes zeros of the values only",
        RULES,
        "aten.scaled_dot_product_attention.default: Rule(_attention, zeros_from_any(2))",
        "aten.scaled_dot_product_attention.default: Rule(_attention, zeros_from_any(0, 2))",
        "zero_queries",
    ),
    Mutation(
        "what is padded along other dims has the same value",
        CONSTANTS,
        "return Known.of(known.mask & (known.value == filled), known.value)",
        "return known",
        "padded",
    ),
    Mutation(
        "along other dims is looked at",
        CONSTANTS,
        "others = [*amounts[:i], *amounts[i + 2 :]]",
        "others = []",
        "padded",
    ),
    Mutation(
        "a quotient is not zero where the divisor is",
        RULES,
        "aten.div.Tensor: Rule(_elementwise, by_evaluation(0)",
        "aten.div.Tensor: Rule(_elementwise, by_evaluation(0, 1)",
        "divides",
    ),
    Mutation(
        "where all are known the function is evaluated",
        CONSTANTS,
        "zero = seen[factor].zero & unknown.any(0)",
        "zero = seen[factor].zero",
        "zero_by_zero",
    ),
    Mutation(
        "zeros stay zeros in products only",
        RULES,
        "ELEMENTWISE = Rule(_elementwise, by_evaluation(), runs_on_nothing=True)",
        "ELEMENTWISE = Rule(_elementwise, by_evaluation(0), runs_on_nothing=True)",
        "plus_what or images",
    ),
    Mutation(
        "all arguments are known",
        CONSTANTS,
        "        mask = mask & known.mask\n    return Known.of(mask, result)",
        "        pass\n    return Known.of(mask, result)",
        "what_is_not_constant",
    ),
    Mutation(
        "no function is evaluated at one size",
        CONSTANTS,
        "    if operation.reads_sizes:\n        return Known.nothing(n)\n",
        "",
        "plus_the_length or times_the_length",
    ),
    Mutation(
        "what is chosen is one number",
        CONSTANTS,
        "both = chosen.mask & option.mask & (chosen.value == option.value)",
        "both = chosen.mask & option.mask",
        "chosen or masked",
    ),
    Mutation(
        "all that can be chosen is known",
        CONSTANTS,
        "both = chosen.mask & option.mask & (chosen.value == option.value)",
        "both = chosen.value == option.value",
        "chosen_of_others",
    ),
    Mutation(
        "a tensor that is chosen is no number",
        RULES,
        "aten.masked_fill.Tensor: Rule(_elementwise, by_choice(0, 2)",
        "aten.masked_fill.Tensor: Rule(_elementwise, by_choice(0)",
        "masked_by_a_tensor",
    ),
    Mutation(
        "both are choices",
        RULES,
        "aten.where.self: Rule(_elementwise, by_choice(1, 2)",
        "aten.where.self: Rule(_elementwise, by_choice(2)",
        "chosen",
    ),
    Mutation(
        "an entry for all features is one number",
        FEATURES,
        "alike = len(entries) > 0 and bool((entries == entries[0]).all())",
        "alike = len(entries) > 0",
        "column_of_seven",
    ),
    Mutation(
        "a parameter is constant along all other dims",
        FEATURES,
        "return Known.of((rows == rows[:, :1]).all(1), rows[:, 0])",
        "return Known.of(torch.ones(len(rows), dtype=torch.bool), rows[:, 0])",
        "table or entries",
    ),
    Mutation(
        "what reads sizes is not constant",
        FLOW,
        "                and not operation.reads_sizes\n",
        "",
        "positions",
    ),
    Mutation(
        "parameters of a norm are constant",
        CONSTANTS,
        "        if not operation.flow.is_constant(parameter):\n            return None\n",
        "        if not operation.flow.is_constant(parameter):\n            continue\n",
        "prelu or batch_norm",
    ),
    Mutation(
        "channels lie along dim 1",
        CONSTANTS,
        "    if dim != 1:\n        return None\n    input, *parameters",
        "    input, *parameters",
        "channels_are_constant",
    ),
    Mutation(
        "both halves are known",
        CONSTANTS,
        "mask = known.mask[:half] & known.mask[half:]",
        "mask = known.mask[:half]",
        "half_is_constant or halves",
    ),
    Mutation(
        "the first half makes zeros, not the second",
        CONSTANTS,
        "found, zero = Known.of(mask, value), known.zero[:half]",
        "found, zero = Known.of(mask, value), known.zero[half:]",
        "halves_are or half_is",
    ),
    # Behind windows and norms.
    *(
        Mutation(
            f"average pools: {name}",
            RULES,
            "of_all = plain and not ceil_mode and divisor is None",
            f"of_all = {new}",
            "average",
        )
        for name, new in (
            ("padding", "not ceil_mode and divisor is None"),
            ("divisor", "plain and not ceil_mode"),
        )
    ),
    Mutation(
        "zeros make the bias of a group",
        RULES,
        "known.mask & of_bias.mask, of_bias.value.masked_fill(~known.mask, 0))",
        "known.mask, torch.zeros_like(of_bias.value))",
        "zeros_in_a_grouped",
    ),
    Mutation(
        "layer_norm adds one number",
        RULES,
        "    value = 0.0 if bias is None else facts.uniform(bias)\n",
        "    value = 0.0\n",
        "layer_norm",
    ),
    Mutation(
        "layer_norm of zeros only",
        RULES,
        "    return type(known).of(known.zero, torch.full_like(known.value, value))",
        "    return type(known).of(known.mask, known.value)",
        "layer_norm",
    ),
    Mutation(
        "layer_norm along other dims",
        RULES,
        "    if value is None or dim in _normalised(operation, len(shape(operation.output))):",
        "    if value is None:",
        "layer_norm",
    ),
    Mutation(
        "instance_norm: statistics",
        RULES,
        '    if operation.arg(5, "use_input_stats", True) is not True:\n'
        "        return of_channels(operation, dim, facts)\n",
        "",
        "instance_norm_of_statistics",
    ),
    # What is folded.
    Mutation(
        "a padded convolution takes in no constants",
        RULES,
        "return sums.flatten(1).sum(1) if unpadded or sums.ndim == 1 else None",
        "return sums.flatten(1).sum(1)",
        "images and (padded or same)",
    ),
    *(
        Mutation(f"transposed: {name}", RULES, old, new, "transposed")
        for name, old, new in (
            ("stride", 'given(3, "stride", 1) == kernel', "True"),
            ("padding", 'and given(4, "padding", 0) == zeros\n', "\n"),
            ("output padding", 'and given(5, "output_padding", 0) == zeros\n', "\n"),
            ("dilation", 'and given(7, "dilation", 1) == ones\n', "\n"),
            (
                "places",
                "return places[:, 0] if apart and alike else None",
                "return places[:, 0] if apart else None",
            ),
            (
                "apart",
                "return places[:, 0] if apart and alike else None",
                "return places[:, 0] if alike else None",
            ),
        )
    ),
    Mutation(
        "each call of a shared module reads the same constants",
        FEATURES,
        "        if not others or any(o is None or not torch.equal(o.value, known.value) for o in others):\n"
        "            return False\n",
        "",
        "shared",
    ),
    Mutation(
        "a bias of two modules takes in nothing",
        FEATURES,
        "return names[0] if len(names) == 1 else None",
        "return names[0]",
        "tied_modules",
    ),
    Mutation(
        "a weight of two modules gets no bias",
        FEATURES,
        '.rpartition(".") if len(names) == 1 else ("", "", "")',
        '.rpartition(".")',
        "tied_modules",
    ),
    Mutation(
        "a weight that is computed of the input has no contribution",
        FEATURES,
        "    if not flow.is_constant(weight):\n        return None\n",
        "",
        "weight_of_the_input",
    ),
    Mutation(
        "what has no fold takes in no constants",
        FEATURES,
        "    if known.value.any() and not _foldable(flow, say, constants, read, known):\n"
        "        return known.zero\n",
        "",
        "sum_of_constants or einsum or images",
    ),
    # What features belong together.
    Mutation(
        "norms of other orders need all",
        RULES,
        'and not 0 < order < float("inf"):\n            return',
        "and False:\n            return",
        "as_norm or negative_order",
    ),
    Mutation(
        "no diagonals",
        RULES,
        'if "." in equation or any(len(set(term)) < len(term) for term in terms):',
        'if "." in equation:',
        "diagonal",
    ),
    Mutation(
        "no ellipsis",
        RULES,
        'if "." in equation or any(len(set(term)) < len(term) for term in terms):',
        "if any(len(set(term)) < len(term) for term in terms):",
        "ellipsis",
    ),
    Mutation(
        "sums over two factors at most",
        RULES,
        "elif len(places) == 2:\n            one, other = places",
        "elif len(places) >= 2:\n            one, other = places[:2]",
        "three_factors",
    ),
    Mutation(
        "similarities of equal sizes",
        RULES,
        "if len(shape(other)) != rank or shape(input)[along] != shape(other)[along]:",
        "if False:",
        "cosine",
    ),
    Mutation(
        "what is random needs all",
        RULES,
        'if operation.arg(training_at, "training", False) is False:',
        "if True:",
        "random",
    ),
    Mutation(
        "reflected features are no other features",
        MOVING,
        "return by_dim if is_filled(operation) else dict.fromkeys(by_dim)",
        "return by_dim",
        "reflected or circular",
    ),
    Mutation(
        "what is filled in is made",
        MOVING,
        "if (numbers < 0).any():",
        "if False:",
        "mixes_features and padded",
    ),
    Mutation(
        "numbers in the code take the same features",
        FEATURES,
        "if rule.takes is not None and not _takes_the_same(operation, rule, stays):",
        "if False:",
        "mixes_features",
    ),
    Mutation(
        "a layer keeps a prefix",
        FEATURES,
        "        yield _a_prefix(operation, stays, ks[operation.args[1]])\n",
        "        pass\n",
        "every_second or last or middle",
    ),
]


def mutated(mutation: Mutation, folder: Path) -> bool:
    """Apply it to the copy; whether the code still has what it changes."""
    path = folder / "taildropout" / mutation.file
    text = (ROOT / "taildropout" / mutation.file).read_text()
    if text.count(mutation.old) != 1:
        return False
    path.write_text(text.replace(mutation.old, mutation.new))
    return True


def failures(selected: str, folder: Path, tests: list[str], *options: str) -> list[str]:
    """The tests that fail of those that are selected."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider"]
    command += ["-p", "no:logging", "-k", selected, *options, *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 1, 5):  # 5: none is selected
        raise RuntimeError(done.stdout + done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return [line.removeprefix("FAILED ").split(" - ")[0] for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutations with this in their name")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="files that may see them")
    args = parser.parse_args()
    left = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("taildropout", "tests"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, folder / part, ignore=ignore)
        for part in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / part, folder / part)
        chosen = [mutation for mutation in MUTATIONS if args.only in mutation.name]
        known = failures(" or ".join(f"({m.seen_by})" for m in chosen), folder, args.tests)
        print(f"{len(known)} tests fail without a mutation: {known}")
        for mutation in chosen:
            start = time.perf_counter()
            original = ROOT / "taildropout" / mutation.file
            if mutated(mutation, folder):
                options = ["-x", *(f"--deselect={test}" for test in known)]
                failed = failures(mutation.seen_by, folder, args.tests, *options)
                seen, words = bool(failed), ", ".join(failed)
            else:
                seen, words = False, "the code has no such place any more"
            shutil.copy(original, folder / "taildropout" / mutation.file)
            left += [] if seen else [mutation.name]
            verdict = "seen by" if seen else "SURVIVES:"
            seconds = time.perf_counter() - start
            print(f"{seconds:5.0f} s  {mutation.name:55} {verdict} {words}", flush=True)
    print(f"{len(left)} of {len(chosen)} survive: {left}")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
