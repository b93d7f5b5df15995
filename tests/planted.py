"""Planted mistakes: a copy of the kernels that holds all of them at once, each behind a switch.

Building a kernel takes seconds, running a case milliseconds: so the right and the wrong text both
stand in one build, and a global number chooses. A right text that ends with a semicolon is a
statement, any other an expression.
"""

import ctypes
import shutil
from dataclasses import dataclass

from host_cuda import emu

_SWITCH = "cusparge_mistake"
_DECLARATION = f'extern "C" {{ __attribute__((visibility("default"))) int {_SWITCH} = 0; }}\n'


@dataclass(frozen=True)
class Mistake:
    """A text of one file and what stands there instead; the case that shows it."""

    file: str
    right: str
    wrong: str
    case: object
    near: str = None  # a text that begins with `right`, where that stands in several places


class Planted:
    """A folder of kernels with switches."""

    def __init__(self, folder, mistakes):
        shutil.copytree(emu.KERNELS, folder)
        self.folder = folder
        self.numbers = {}
        types = folder / "cusparge/types.cuh"
        first = "namespace cusparge {\n"
        types.write_text(types.read_text().replace(first, _DECLARATION + first, 1))
        for number, (name, mistake) in enumerate(mistakes.items(), start=1):
            path = next(folder.rglob(mistake.file))
            text = path.read_text()
            near = mistake.near or mistake.right
            assert near.startswith(mistake.right), name
            assert near in text, (name, "the text is not there")
            rest = near.removeprefix(mistake.right)
            path.write_text(text.replace(near, self._either(number, mistake) + rest))
            self.numbers[name] = number

    @staticmethod
    def _either(number, mistake):
        right, wrong = mistake.right, mistake.wrong
        if right.endswith(";"):
            return f"if (::{_SWITCH} == {number}) {{ {wrong} }} else {{ {right} }}"
        # A constant expression cannot ask; what is known when compiling stays right.
        chosen = f"::{_SWITCH} == {number} ? ({wrong}) : ({right})"
        return f"(__builtin_is_constant_evaluated() ? ({right}) : {chosen})"

    def choose(self, name):
        """Make one mistake, or with None all right, in whatever was built of this folder."""
        number = 0 if name is None else self.numbers[name]
        for file, module in emu._Module.built.items():
            if file.is_relative_to(self.folder.resolve()):
                ctypes.c_int.in_dll(module.library, _SWITCH).value = number
