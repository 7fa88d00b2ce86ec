"""The objects of composed pictures, by theme, and the Tux Paint stamps that show them.

Only nouns that look like one thing, and that no other object could be called too, are here: no
flower beside a rose. Stamps are named by their place below the package's folder of stamps.
"""

from collections.abc import Mapping

__all__ = ["STAMPS", "SYNONYMS", "THEMES"]

STAMPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "animals": {
        "dog": ("animals/mammals/dogs/dog",),
        "lion": ("animals/mammals/cats/lion", "animals/mammals/cats/lion-2"),
        "horse": ("animals/mammals/equines/horse",),
        "elephant": ("animals/mammals/elephant",),
        "cow": ("animals/mammals/bovines/cow", "animals/mammals/bovines/cow_white"),
        "frog": ("animals/amphibians/frog", "animals/amphibians/frog-1"),
        "penguin": ("animals/birds/penguin", "animals/birds/magellanic_penguin"),
        "rabbit": ("animals/mammals/rodents/rabbit-2", "animals/mammals/rabbit_little"),
    },
    "food": {
        "apple": ("food/fruit/apple_green", "food/fruit/apple_red", "food/fruit/apple_fuji"),
        "banana": ("food/fruit/banana", "food/fruit/cartoon/banana"),
        "orange": ("food/fruit/orange", "food/fruit/cartoon/orange"),
        "strawberry": ("food/fruit/strawberry", "food/fruit/Strawberry2"),
        "pineapple": ("food/fruit/pineapple", "food/fruit/cartoon/pineapple"),
        "carrot": ("food/vegetables/carrot",),
        "onion": ("food/vegetables/onion",),
        "pizza": ("food/pizza",),
    },
    "plants": {
        "rose": ("plants/flowers/rose",),
        "daffodil": ("plants/flowers/daffodil",),
        "iris": ("plants/flowers/iris",),
        "marigold": ("plants/flowers/marigold",),
        "mushroom": ("plants/mushrooms/cep", "plants/mushrooms/cep-1"),
        "hibiscus": ("plants/flowers/chemparathi", "plants/flowers/flower10"),
        "palm": ("plants/trees/liberia-palm",),
        "pinecone": ("plants/trees/pinecone",),
    },
    "vehicles": {
        "car": ("vehicles/auto/sedan", "vehicles/auto/sportscar2", "vehicles/auto/beetle"),
        "bus": ("vehicles/masstransit/green_korean_bus",),
        "truck": ("vehicles/auto/truck", "vehicles/construction/cartoon/terex"),
        "airplane": ("vehicles/flight/planes/747", "vehicles/flight/planes/cartoon/plane"),
        "helicopter": ("vehicles/flight/cartoon/eddieCopter",),
        "balloon": ("vehicles/flight/balloon360",),
        "tricycle": ("vehicles/cycle/pink_tricycle",),
        "train": ("vehicles/locomotive/cartoon/toy_train",),
    },
    "household": {
        "hammer": ("household/tools/hammer",),
        "key": ("household/key",),
        "mug": ("household/dishes/mug",),
        "teapot": ("household/dishes/teapot",),
        "paintbrush": ("household/tools/paintbrush_large",),
        "saw": ("household/tools/saw",),
        "wrench": ("household/tools/wrench", "household/tools/wrench_adjustable"),
        "lightbulb": ("household/Lightbulb",),
    },
}
THEMES: Mapping[str, tuple[str, ...]] = {theme: tuple(found) for theme, found in STAMPS.items()}
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "dog": ("puppy",),
    "palm": ("palm tree",),
    "airplane": ("aeroplane", "plane"),
    "balloon": ("hot air balloon",),
    "paintbrush": ("brush",),
    "mug": ("cup",),
    "lightbulb": ("light bulb",),
}
