"""The glyph world: a vision-language model that can be trained in minutes, to measure SPIN on.

Pictures hold coloured glyphs of one of four themes; captions list them, and sometimes what was not
drawn, so that a model learns to name what usually goes together: a prior that hallucinates.
It is a toy: it says which way an effect goes, and nothing about published models.
"""
