"""The native half of the CUDA target: INT8 kernels as custom operators of ONNX Runtime.

schema     the operators: names, inputs, outputs, attributes
reference  what they mean, in standard operators
kernels    over rows: quantise, norms, activations        (Triton)
gemm       INT8 GEMM for every architecture               (Triton)
gemm_hopper  INT8 GEMM for sm_90                          (Gluon)
tiles      tiles of the GEMM and what they cost
variants   every kernel that is compiled
aot        compiles them, without a GPU
emit       generated sources of the library
build      the library, by one command
library    which library a session registers
native/    its C++ sources
"""
