"""An emulator for the PTX that Triton and nvcc emit for the kernels of this package.

parse.py         text of PTX -> kernels, instructions, operands
arithmetic.py    what the instructions compute, in NumPy, as the PTX ISA defines it
memory.py        global and shared memory, with a shadow that knows who wrote and read what, and when
instructions.py  the table of instructions
execute.py       a launch: the threads of some blocks at once, divergence by masks, barriers, counters
compile.py       Triton and nvcc as compilers, with a cache; launches of Triton kernels from their own launchers
"""
