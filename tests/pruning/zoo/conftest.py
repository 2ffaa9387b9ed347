"""The order of the tests: all of one network follow each other, which is then read once."""


def pytest_collection_modifyitems(items):
    order = {}
    items.sort(key=lambda item: order.setdefault(network_of(item), len(order)))


def network_of(item):
    """What belongs to none of them stays where it is."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return (item.path, params["p"][0]) if "p" in params else item.nodeid
