"""SPIN on a small but real vision-language model: a frozen language model and eyes made for it.

Pictures are composed of Tux Paint's stamps (`edgekit.data.stamps`); captions sometimes mention what
was not drawn, so that the model learns to name what usually goes together. It is trained by the
project, and says nothing about published models.
"""
