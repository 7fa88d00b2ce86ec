"""Word pairs that name a needle, such as `gentle-harbor`."""

import random

__all__ = ["word_pair"]

ADJECTIVES = tuple(
    """
    able ample ancient amber bold brave brief bright brisk broad calm candid careful cheerful civil
    clean clever cosy crisp curious daring deep eager early earnest easy elegant even fair faithful
    famous fine firm fond frank free fresh frosty gentle glad golden graceful grand grateful handy
    happy hardy hasty hearty honest humble icy jolly keen kind large lively lofty loyal lucky mellow
    merry mild modest narrow neat nimble noble odd patient plain pleasant polite proud pure quick
    quiet rapid rare ready round rustic secret serene sharp shiny silent simple slender smooth sober
    soft solid steady stout subtle sunny swift tall tame tender tidy tranquil true vast vivid warm
    wide wild wise witty young zealous
    """.split()  # noqa: SIM905 - a hundred quoted words are no easier to read
)
NOUNS = tuple(
    """
    acorn anchor apron arch arrow badge banner barn basin basket beacon bench bell blanket boat book
    bottle branch bridge brook brush bucket button cabin candle canoe carpet castle cellar chair
    chapel cherry clock cloud coach coast coin compass copper cottage cradle crane creek crown
    curtain desert desk door drum engine feather fence ferry field flag flute forest fountain garden
    gate glove grove hammer harbor hat hill horn island jacket jar kettle key kite ladder lake lamp
    lantern leaf ledger lemon letter library lily market meadow mill mirror moon mountain needle
    orchard oven paddle paper pebble pencil piano pillow pine planet plum pocket pond quilt raft
    river road rope saddle sail scarf shelf shell ship spoon stone stove table temple thread tower
    valley vessel village violin wagon well wheel willow window
    """.split()  # noqa: SIM905 - a hundred quoted words are no easier to read
)


def word_pair(rng: random.Random) -> str:
    """An adjective and a noun joined by a hyphen, drawn from `rng`."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
