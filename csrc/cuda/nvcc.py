"""How csrc/cuda/kernels.cu is compiled, for setup.py and the tests."""

# For these processors, and for later ones as intermediate code; TORCH_CUDA_ARCH_LIST overrides it.
ARCH_LIST = "8.0;9.0;9.0a;10.0+PTX"
ARCHITECTURES = [arch.removesuffix("+PTX").replace(".", "") for arch in ARCH_LIST.split(";")]

NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-Wall,-fvisibility=hidden"]
