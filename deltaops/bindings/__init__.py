"""Users of the native core that are not torch: C, NumPy and JAX. None knows another, or torch."""
