"""jaxtyping's shapes for what a bundle is served with, which does without the package: they tell, and nothing runs by them.

Modules on the way from a bundle to speech take these; all others import jaxtyping itself.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Int, Int16, Int32, Integer, Key, Shaped
else:
    try:
        from jaxtyping import Bool, Float, Float32, Int, Int16, Int32, Integer, Key, Shaped
    except ModuleNotFoundError:

        class Shaped:
            """`Shaped[np.ndarray, "F M"]` is the array's type alone."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Float = Float32 = Int = Int16 = Int32 = Integer = Key = Shaped

__all__ = ["Bool", "Float", "Float32", "Int", "Int16", "Int32", "Integer", "Key", "Shaped"]
