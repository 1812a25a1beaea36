"""The native backend: C++ kernels for CPUs, compiled on the machine that runs them.

backend  what it takes; the first import compiles the kernels, or says why it cannot
build    finds a compiler, compiles the sources in `cpp`, keeps the library
library  loads it and calls it
stages   the stages, each one call of the library
chunk    attention of many queries, by matrix products of torch
cos_sin  tables of cos and sin
"""
