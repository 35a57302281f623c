"""Triton 3.6's interpreter with numpy 2.4 and newer."""

import triton.runtime.interpreter as interpreter


def take_scalars_as_integers() -> None:
    """A scalar of an interpreted kernel, which is an array of one element, bounds a loop of Python again.

    Triton 3.6 converts the array by ``int``, which numpy 2.4 and later refuse for arrays of one dimension.
    """
    patch = interpreter._patch_lang_tensor

    def patched(tensor_class, scope):
        patch(tensor_class, scope)
        scope.set_attr(tensor_class, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
