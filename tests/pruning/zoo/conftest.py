"""The order of the tests: all of one network follow each other, which is then read once."""


def pytest_collection_modifyitems(items):
    order = {}
    items.sort(key=lambda item: order.setdefault(network_of(item), len(order)))


def network_of(item):
    """What belongs to none of them stays where it is."""
    place = item.callspec.params.get("p") if hasattr(item, "callspec") else None
    return (item.path, place[0]) if isinstance(place, tuple) else item.nodeid
