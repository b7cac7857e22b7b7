"""On how many examples a property is tried: half of them in `make test`, others in each run; all in `make test-full`.

`pytest --hypothesis-profile=full` chooses the latter. A failure prints the line that repeats it. What compares rounded
numbers with a tolerance says `derandomize=True`: among thousands of shapes one is always a rounding beyond it.
"""

from hypothesis import settings

settings.register_profile("half", max_examples=50, deadline=None, print_blob=True)
settings.register_profile("full", max_examples=100, deadline=None, print_blob=True)
settings.load_profile("half")


def examples(count: int, **options) -> settings:
    """Settings of a property that deserves `count` examples; `options` are those of `hypothesis.settings`."""
    return settings(max_examples=max(1, count * settings.default.max_examples // 100), **options)
