"""Prompts for which guessing pays differently: answers that repeat their prompt, and answers that do not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """Prompts of one sort; an answer to each is generated greedily."""

    name: str
    prompts: tuple[str, ...]


_HARBOUR = """\
The harbour of Oldmere was built in three stages. The first quay, finished in 1871, was made of oak piles and served \
fishing boats only. The second quay, finished in 1904, was made of granite from the quarry at Stennet and could take \
steamers of up to two thousand tons. The third quay, finished in 1958, was made of concrete and is the one that \
ferries use today. The oak piles were removed in 1933 after a storm had broken most of them. The granite quay is a \
listed monument, and its two cranes were restored by volunteers between 1996 and 2003. Every summer the harbour board \
opens the cranes to visitors, and about nine thousand people climb them. The board plans to deepen the ferry channel \
from six to eight metres by 2027, which will let larger ferries enter at low tide."""
_BEES = """\
Mason bees live alone. Each female looks for a hollow stem or a hole in a wall, carries in pollen and nectar, lays one \
egg on the store, and closes the cell with mud. A stem of fifteen centimetres holds about eight cells. The eggs at the \
back become females, the eggs at the front become males, and the males leave first in spring. Mason bees fly at lower \
temperatures than honey bees, from about ten degrees, so that they visit apple blossom on days when honey bees stay in \
the hive. Growers of apples therefore hang bundles of reeds in their orchards. Two hundred and fifty females are \
enough for a hectare. The bundles have to be kept dry, and cells with parasites are taken out in winter."""
_MEETING = """\
Anna: The printer on the second floor jams again, it is the third time this week.
Boris: I called the service on Monday. They will send a technician on Thursday morning.
Anna: Until then everybody should use the printer on the first floor.
Chen: The first floor printer has no paper left. I ordered ten boxes, they come tomorrow.
Boris: Then we print nothing today unless it is urgent. Urgent things can go to the copy shop.
Anna: Who pays for the copy shop?
Chen: Keep the receipt and give it to me, I pay it back from the office budget.
Boris: Good. I will write a note and hang it on both printers."""
_ORDERS = """\
def total_price(orders, tax_rate):
    total = 0
    for order in orders:
        price = order["price"]
        quantity = order["quantity"]
        discount = order["discount"]
        total = total + price * quantity - discount
    return total * (1 + tax_rate)


def largest_order(orders):
    largest = None
    for order in orders:
        if largest is None or order["price"] > largest["price"]:
            largest = order
    return largest
"""
_STACK = """\
class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        item = self.items[-1]
        del self.items[-1]
        return item

    def is_empty(self):
        return len(self.items) == 0

    def size(self):
        return len(self.items)
"""
_CONFIG = """\
import json


def load_config(path):
    file = open(path)
    config = json.load(file)
    file.close()
    return config


def save_config(path, config):
    file = open(path, "w")
    json.dump(config, file)
    file.close()


def merge_configs(first, second):
    merged = {}
    for key in first:
        merged[key] = first[key]
    for key in second:
        merged[key] = second[key]
    return merged
"""

KINDS = (
    Kind(
        "summary",
        (
            f"Summarize the following text in three sentences, in its own words where possible.\n\n{_HARBOUR}",
            f"List the facts of this text, one per line, quoting it.\n\n{_BEES}",
            f"Write the minutes of this conversation: who said what, and what was decided.\n\n{_MEETING}",
        ),
    ),
    Kind(
        "code edit",
        (
            f"Rename the variable total to amount and return the whole code.\n\n```python\n{_ORDERS}```",
            f"Add a docstring to every method and return the whole class.\n\n```python\n{_STACK}```",
            f"Use with statements for the files and return the whole code.\n\n```python\n{_CONFIG}```",
        ),
    ),
    Kind(
        "chat",
        (
            "What should I think about before I buy a used bicycle?",
            "Tell me a short story about a lighthouse keeper who is afraid of the dark.",
            "Explain to a ten-year-old why the moon does not fall down.",
        ),
    ),
)
