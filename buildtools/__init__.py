"""How setup.py builds the native code: ``toolchain`` finds compilers, ``objects`` runs them,
``recipe`` says what is built.

Plain Python without torch or deltaops, since it runs before either is installed.
"""
