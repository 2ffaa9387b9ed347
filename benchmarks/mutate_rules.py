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
PATHS, EXPORTS = "graph/paths.py", "graph/exports.py"
NORMS, TAILS, RELATIONS = "graph/norms.py", "graph/tails.py", "graph/relations.py"
PREDICTED, CUTS, SIZES = "pruning/predicted.py", "pruning/cuts.py", "pruning/sizes.py"
TESTS = [
    "tests/graph",
    *(f"tests/pruning/test_{name}.py" for name in ("every_size", "plan", "sizes", "outputs")),
]


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
        "channels_are",
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
    Mutation(
        "along other dims than its own a layer drops what was constant",
        CONSTANTS,
        "along_others = dim != own and puts_zeros",
        "along_others = False",
        "drops_positions",
    ),
    Mutation(
        "zeros of factors, not of a bias",
        CONSTANTS,
        "        if place[0] in factors:\n",
        "        if True:\n",
        "bias_of_zeros",
    ),
    Mutation(
        "halves of another dim are multiplied",
        CONSTANTS,
        "Known.of(both.mask, both.value * both.value.sigmoid())",
        "both",
        "halves_of_another_dim",
    ),
    Mutation(
        "a size that is chosen is not known",
        CONSTANTS,
        "                if not is_tensor(choice):\n                    return known\n",
        "",
        "masked_by_a_size",
    ),
    Mutation(
        "a size that fills is not known",
        CONSTANTS,
        "        if not isinstance(number, int | float):\n            return None\n        alike",
        "        alike",
        "full_like_a_size",
    ),
    Mutation(
        "functions of truth values are evaluated",
        CONSTANTS,
        "return value if dtype.is_floating_point else value.to(dtype)",
        "return value",
        "truth_value",
    ),
    Mutation(
        "one number for all: all are known",
        FEATURES,
        "known.mask.all() and len(known.value.unique()) == 1",
        "len(known.value.unique()) == 1",
        "sums_of_all_pairs",
    ),
    Mutation(
        "one number for all: all are one",
        FEATURES,
        "known.mask.all() and len(known.value.unique()) == 1",
        "known.mask.all()",
        "one_number",
    ),
    Mutation(
        "what a layer computes is not constant",
        FLOW,
        "                and operation.target is not LAYER\n",
        "",
        "weight_behind_the_layer",
    ),
    Mutation(
        "what is drawn is not constant",
        FLOW,
        "                and len(operation.sources) > 0\n",
        "",
        "number_that_is_drawn",
    ),
    Mutation(
        "places of values are no values",
        RULES,
        "        if operation.pick not in (None, 0):\n            return\n        input",
        "        input",
        "places_of_the_largest",
    ),
    Mutation(
        "samples of zeros make no bias of a group",
        RULES,
        "    if dim != 1:\n        return None\n    known = zeros",
        "    known = zeros",
        "samples_that_are_zero",
    ),
    Mutation(
        "instance_norm along channels only",
        RULES,
        "known = facts.at((operation.args[0], dim)) if dim == 1 else None",
        "known = facts.at((operation.args[0], dim))",
        "instance_norm_over_features",
    ),
    # Behind windows and norms.
    *(
        Mutation(
            f"average pools: {name}",
            RULES,
            "of_all = plain and divisor is None",
            f"of_all = {new}",
            "average",
        )
        for name, new in (
            ("padding", "divisor is None"),
            ("divisor", "plain"),
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
        "return sums.flatten(1).sum(1) if unpadded else None",
        "return sums.flatten(1).sum(1)",
        "images and (padded or same)",
    ),
    *(
        Mutation(f"transposed: {name}", RULES, old, new, "transposed")
        for name, old, new in (
            ("stride", 'given(3, "stride", 1) == kernel', "True"),
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
    Mutation(
        "a bias is read there only",
        FEATURES,
        "    if isinstance(read.bias, fx.Node):\n        users += flow.users[read.bias]\n",
        "",
        "bias_of_its_own_and",
    ),
    Mutation(
        "whatever reads the weight reads it so",
        FEATURES,
        "        if not others or any(o is None",
        "        if any(o is None",
        "bias_of_its_own_and",
    ),
    Mutation(
        "a new bias in its own module only",
        FEATURES,
        '    if attribute != "weight" or module_of(read.operation) != owner:',
        '    if attribute != "weight":',
        "without_its_bias",
    ),
    Mutation(
        "no new bias where there is one",
        FEATURES,
        "isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module.bias is None:",
        "isinstance(module, nn.Linear | nn.modules.conv._ConvNd):",
        "without_its_own_bias",
    ),
    Mutation(
        "a bias takes in each constant once",
        CUTS,
        "if name is None or name in done or not values.any():",
        "if name is None or not values.any():",
        "called_twice_takes_in",
    ),
    Mutation(
        "a new bias has the rows that stay",
        CUTS,
        "if not isinstance(read.bias, fx.Node) and rows in found.stays:",
        "if False:",
        "rows_that_stay",
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
        "no diagonals and no ellipsis",
        RULES,
        "if any(len(set(term)) < len(term) for term in terms):",
        "if False:",
        "diagonal or ellipsis",
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
        "filled_in_stays",
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
        "keeps_a_prefix",
    ),
    Mutation(
        "no products with vectors",
        RULES,
        "        if rank < 2 or rank_right < 2:\n            return\n",
        "",
        "by_a_vector",
    ),
    Mutation(
        "weights that are normalised by rows",
        RULES,
        '    if operation.arg(2, "dim", 0) == 0:\n',
        "    if True:\n",
        "norm_of_columns",
    ),
    Mutation(
        "entries of one for all are not summed",
        RELATIONS,
        "if n is not None and (weight is None or n == count_of(weight)):",
        "if n is not None:",
        "one_for_all",
    ),
    Mutation(
        "rolls in a row move all dims",
        MOVING,
        "        return dict.fromkeys(range(rank))\n\n    def roll",
        "        return {}\n\n    def roll",
        "rolled_in_a_row",
    ),
    Mutation(
        "rows by one index",
        MOVING,
        "if len(given) == 1 and given",
        "if given",
        "taken_is_asked or index",
    ),
    Mutation(
        "an index means features that are there",
        MOVING,
        "numbers if n > int(numbers.max()) else numbers[:0]",
        "numbers",
        "some_of_them or order",
    ),
    Mutation(
        "a tensor of the code stays",
        FEATURES,
        "            if not flow.names[node]:\n",
        "            if False:\n",
        "no_parameter",
    ),
    Mutation(
        "a layer hands on the same features each time",
        FEATURES,
        '            yield _Need(place, anywhere, f"layer',
        '            continue\n            yield _Need(place, anywhere, f"layer',
        "called_twice",
    ),
    Mutation(
        "torch can't run on nothing",
        FEATURES,
        "if gone.all() and not rule.runs_on_nothing:",
        "if False:",
        "cannot_run",
    ),
    Mutation(
        "a tail comes from nothing else",
        TAILS,
        "return of_tail[there + 1] & ~of_prefix[there + 1]",
        "return of_tail[there + 1]",
        "outputs and not saved",
    ),
    # Root mean square norms.
    Mutation(
        "norms: one eps",
        NORMS,
        "if user.target in _SUMS and adds is None and isinstance",
        "if user.target in _SUMS and isinstance",
        "norms_that_stay",
    ),
    Mutation(
        "norms: the mean is used once",
        NORMS,
        "users[0] if len(users) == 1 and node not in flow.returned",
        "users[0] if users and node not in flow.returned",
        "norms_that_stay",
    ),
    Mutation(
        "norms: the mean is not returned",
        NORMS,
        "users[0] if len(users) == 1 and node not in flow.returned",
        "users[0] if len(users) == 1",
        "mean_that_is_returned",
    ),
    Mutation(
        "norms: the root and no other power",
        NORMS,
        "aten.pow.Tensor_Scalar and operation.args[1] == exponent",
        "aten.pow.Tensor_Scalar",
        "norms_that_stay",
    ),
    Mutation(
        "norms: what is returned takes no factor",
        NORMS,
        "        if value in flow.returned:\n            return None\n",
        "",
        "root_that_is_returned",
    ),
    Mutation(
        "norms: the factor arrives once",
        NORMS,
        "                return None  # it reads two values, both of which have the factor\n",
        "                continue\n",
        "norms_that_stay",
    ),
    Mutation(
        "norms: a divisor takes no factor",
        NORMS,
        "taker = None if divides and value is node else _taker(user, value)",
        "taker = _taker(user, value)",
        "norms_that_stay",
    ),
    Mutation(
        "norms: a square has the factor twice",
        NORMS,
        "return _other_argument(user, value) is not value",
        "return True",
        "norms_that_stay",
    ),
    Mutation(
        "norms: a quotient has the factor of what is divided",
        NORMS,
        "        return user.args[1] is not value\n",
        "        return True\n",
        "norms_that_stay",
    ),
    Mutation(
        "norms: the root divides",
        NORMS,
        "is_divisor = user.target in _QUOTIENTS and user.args[0] is not value",
        "is_divisor = user.target in _QUOTIENTS",
        "norms_that_stay",
    ),
    Mutation(
        "norms: a function has no factor",
        NORMS,
        "return moves and user.args[0] is value",
        "return True",
        "norms_that_stay",
    ),
    Mutation(
        "norms: no rounding",
        NORMS,
        "operation.target in _CASTS and (dtype.is_floating_point or dtype.is_complex)",
        "operation.target in _CASTS",
        "norms_that_stay",
    ),
    Mutation(
        "norms: what is added to a weight is used once",
        NORMS,
        "if _only_user(flow, node) is None or not operation.sources:",
        "if not operation.sources:",
        "norms_that_stay",
    ),
    Mutation(
        "norms: one number more than the weight",
        NORMS,
        "operation.target in _SUMS and plus == 0.0 and isinstance",
        "operation.target in _SUMS and isinstance",
        "no_parameter_and_a_number",
    ),
    Mutation(
        "norms: no function of a weight",
        NORMS,
        "elif not _is_cast(operation) and operation.target not in _MOVES:",
        "elif False:",
        "no_parameter_and_a_number",
    ),
    Mutation(
        "norms: no multiple is added",
        NORMS,
        'operation.kwargs.get("alpha", 1) != 1',
        "False",
        "no_parameter_and_a_number",
    ),
    Mutation(
        "norms: a parameter is the weight",
        NORMS,
        '    if not operation.flow.names.get(weight):\n        return "has no parameter as its weight"\n',
        "",
        "norms_that_stay",
    ),
    Mutation(
        "norms: eps is an attribute",
        NORMS,
        "if norm.adds is not None and holder is None:",
        "if False:",
        "norms_that_stay",
    ),
    Mutation(
        "norms: the attribute is read for eps only",
        NORMS,
        "if set(on_each_path.values()) == {seen.get(holder)}:",
        "if seen.get(holder):",
        "norms_that_stay",
    ),
    Mutation(
        "norms: no number is computed from eps",
        NORMS,
        "        if holder is None:\n            return {}\n",
        "        if holder is None:\n            continue\n",
        "norms_that_stay",
    ),
    Mutation(
        "norms: the weight is not used elsewhere",
        NORMS,
        "if set(self.flow.users[factor.weight]) != set(sharing):",
        "if False:",
        "norms_that_stay",
    ),
    Mutation(
        "norms: of one weight, over as many features",
        NORMS,
        "elif any(counts[other] != (n, m) for other in sharing.values()):",
        "elif False:",
        "norms_of_one_weight",
    ),
    Mutation(
        "norms: of one eps, over as many features",
        NORMS,
        "if any(counts[other] != (n, m) for other in others):",
        "if False:",
        "norms_of_one_eps",
    ),
    # Sizes that are numbers in the example.
    Mutation(
        "rows of a table that are not taken at these sizes",
        FEATURES,
        "rest = torch.ones(count_of(place) or 0, dtype=torch.bool)",
        "rest = torch.zeros(count_of(place) or 0, dtype=torch.bool)",
        "rows_of_a_table",
    ),
    Mutation(
        "what sizes of one are broadcast against",
        EXPORTS,
        "if not _of_torch(guard) or _symbols_for_one(environment, [guard])",
        "if not _of_torch(guard)",
        "size_of_one or batch_of_one",
    ),
    Mutation(
        "sizes that run only where all others are one",
        PATHS,
        "        yield turn(export.resized(dict.fromkeys(own, 1)))\n",
        "",
        "all_others_are_one",
    ),
    Mutation(
        "dims of one size that change together",
        PATHS,
        "        yield turn(export.inputs, every_dim=True)\n",
        "",
        "size_of_the_batch or batch_alone",
    ),
    Mutation(
        "small lengths where lengths are numbers",
        PATHS,
        "(size - 1, size + 1, 1, 2, 4 * size + 1)",
        "(size - 1, size + 1, 4 * size + 1)",
        "length_of_one or left_out",
    ),
    Mutation(
        "steps that are left out at small lengths",
        PATHS,
        "return called == usual or (len(called) > len(usual) and set(called) == set(usual))",
        "return set(called) <= set(usual)",
        "left_out",
    ),
    Mutation(
        "layers with other numbers of features at small lengths",
        PATHS,
        '            self.seen.append(f"{args[1:]}")',
        "            pass",
        "fewer_features",
    ),
    Mutation(
        "inputs are left without marks",
        EXPORTS,
        "return value.detach().requires_grad_(value.requires_grad)",
        "return value",
        "without_marks",
    ),
    # The second look, at the small network.
    Mutation(
        "the small network: the same operations",
        PREDICTED,
        "        if node.target != own.target:\n            return False\n",
        "",
        "widths or if_wide or called_twice",
    ),
    Mutation(
        "the small network: the same values",
        PREDICTED,
        "return isinstance(arg, fx.Node) and self.twin.get(\n"
        "                self._unsliced(own)\n            ) is self._unsliced(arg)",
        "return isinstance(arg, fx.Node)",
        "widths or forms_of_outputs or outputs_of_a_class",
    ),
    Mutation(
        "the small network: the same numbers",
        PREDICTED,
        "return type(number) is type(own_number) and bool(number == own_number)",
        "return True",
        "widths or forms_of_outputs",
    ),
    Mutation(
        "the small network: the shape that is left",
        PREDICTED,
        "        return shapes == own_shapes\n",
        "        return True\n",
        "widths or forms_of_outputs or heads",
    ),
    Mutation(
        "the small network: the same comparisons",
        PREDICTED,
        "if node is None and not _compares_like(path, own)",
        "if False",
        "widths or paths_of_the_width",
    ),
    Mutation(
        "the small network: the same constants",
        PREDICTED,
        "(constant is None or _equal(constant, own_constant))",
        "True",
        "widths or forms_of_outputs",
    ),
    Mutation(
        "one meaning of a number of features",
        SIZES,
        "        if len(sizes) == 1:\n            setattr(module, attribute, sizes.pop())",
        "        if sizes:\n            setattr(module, attribute, min(sizes))",
        "may_mean_other",
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
    lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if not lines and done.returncode not in (0, 5):  # 5: none is selected
        raise RuntimeError(done.stdout + done.stderr)
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
