"""Hand kernels behind `spyx.ops`: `tpu` (Pallas Mosaic) and `gpu` (Pallas Triton, NVIDIA).

They compute what the plain JAX forms compute, on shapes and dtypes for which their `*_fits` predicate
holds, and have no differentiation rules: `spyx.ops` calls them inside its `custom_vjp`s.
"""
