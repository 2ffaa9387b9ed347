"""Random networks around TailDropout layers: pruned exactly at every size, never wrongly."""

import pytest
import torch

from benchmarks import random_networks
from benchmarks.attack_pruning import CUT, FAILURES, REFUSED, WRONG, attack, main, shrink, table
from benchmarks.random_networks import Network, Statement, draw_network
from taildropout.graph import rules
from taildropout.graph.constants import from_related

pytestmark = pytest.mark.slow

# A layer along a dim whose size the caller chooses has no one width.
REFUSALS = ["must be called with one number of features"]


def test_random_networks_are_exact_at_every_size():
    outcomes = [attack(draw_network(seed)) for seed in range(60)]
    failed = [outcome for outcome in outcomes if outcome.kind in FAILURES]
    assert not failed, "\n\n".join(f"{o}\n{draw_network(o.seed).describe()}" for o in failed)
    refused = [outcome for outcome in outcomes if outcome.kind == REFUSED]
    assert all(any(words in outcome.words for words in REFUSALS) for outcome in refused), refused
    cut = [outcome for outcome in outcomes if outcome.kind == CUT]
    assert len(cut) >= 0.6 * len(outcomes), table(outcomes)
    assert sum(outcome.sizes for outcome in cut) >= 8 * len(cut)


def test_all_that_stands_in_the_tables_is_drawn():
    """The tables can't hold what never runs."""
    tables = [value for name, value in vars(random_networks).items() if name.isupper()]
    lists = [t for t in tables if isinstance(t, list)]
    lists += [t for table in tables if isinstance(table, dict) for t in table.values()]
    missing = {template for templates in lists for template in templates}
    for seed in range(20_000):  # some are rare
        missing -= {statement.template for statement in draw_network(seed).statements}
        if not missing:
            break
    assert not missing


def test_a_seed_gives_the_same_network():
    torch.manual_seed(1)
    one = draw_network(7)
    torch.manual_seed(2)
    other = draw_network(7)
    assert one == other
    assert repr(one.build()) == repr(other.build())
    states = zip(
        one.build().state_dict().values(), other.build().state_dict().values(), strict=True
    )
    assert all(torch.equal(a, b) for a, b in states)


def constants_that_are_added_up():
    """cos makes ones of the tail; their sum over time is another at each length."""
    lines = [
        ("h1", "self.a({0})", ("x",)),
        ("h2", "self.t({0})", ("h1",)),
        ("h3", "{0}.cos()", ("h2",)),
        ("h4", "{0}.relu()", ("h3",)),
        ("h5", "{0}.sum(1)", ("h4",)),
        ("h6", "self.b({0})", ("h5",)),
    ]
    made = {"a": "nn.Linear(3, 6)", "t": "TailDropout()", "b": "nn.Linear(6, 2)"}
    statements = tuple(Statement(*line, "", "") for line in lines)
    return Network(0, {"x": "BTF"}, {"B": 2, "T": 1}, made, statements, k={"t": 2})


def test_a_wrong_rule_is_found_and_what_it_is_wrong_in(monkeypatch):
    network = constants_that_are_added_up()
    assert attack(network).kind not in FAILURES
    # Pruning would see it itself.
    monkeypatch.setattr("taildropout.pruning.plan.verify", lambda *_, **__: None)
    wrong = rules.Rule(rules._summing(1), from_related)
    monkeypatch.setitem(rules.RULES, torch.ops.aten.sum.dim_IntList, wrong)
    outcome = attack(network)
    assert outcome.kind == WRONG
    assert "differs at T = " in outcome.words
    assert [s.expression for s in shrink(network).statements] == [
        "self.a({0})",
        "self.t({0})",
        "{0}.cos()",
        "{0}.sum(1)",
        "self.b({0})",
    ]


def test_the_command_prints_what_fails_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["attack", "--only", "0"])
    assert main() == 0
    assert "none failed" in capsys.readouterr().out
    monkeypatch.setattr("benchmarks.attack_pruning._difference", lambda *_: "by all")
    assert main() == 1
    printed = capsys.readouterr().out
    assert "class Network(nn.Module):" in printed
    assert "failed: [0]" in printed
