"""Which dtype a recurrent state has: float32 or wider, complex as pairs of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Complex, Float


def x64_enabled() -> bool:
    """Whether JAX keeps 64-bit values (jax_enable_x64)."""
    return jax.dtypes.canonicalize_dtype(jnp.float64) == jnp.float64


def state_dtype(*values: Array | None) -> jnp.dtype:
    """The real dtype, float32 or wider, that holds the parts of every value; None is passed over."""
    parts = [jnp.finfo(v.dtype).dtype for v in values if v is not None]
    return jnp.result_type(jnp.float32, *parts)


def widen(value: ArrayLike) -> Float[Array, "..."]:
    """A real value in float32 or wider."""
    value = jnp.asarray(value)
    return value.astype(state_dtype(value))


def to_complex(re: ArrayLike, im: ArrayLike) -> Complex[Array, "..."]:
    """re + i im, complex64, or complex128 if a part is float64."""
    re, im = jnp.asarray(re), jnp.asarray(im)
    dtype = state_dtype(re, im)
    return jax.lax.complex(re.astype(dtype), im.astype(dtype))


def float32_of(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """What a float32 array of a shape is like, for `jax.eval_shape` and for kernels that make one."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)
